"""Attention and SwiGLU without MLX's scalar exponentials.

MLX's exp on the CPU is scalar: 19 ns a number on x86, where `numerics.exponential` takes 5. Attention and SwiGLU ask
for so many that they were a third of a forward (docs/figures.md)."""

from __future__ import annotations

import math

import mlx.core as mx

from rollout_server.engine.sampling.numerics import LARGEST, exponential

SCORES = 2**20
"""Products of queries and keys that are alive at once, where one query's come to no more. The exponential makes six
arrays of that size."""
LOWEST = float(mx.finfo(mx.float32).min)
"""The score of what may not be read, as in MLX: a query that may read nothing reads everything alike."""


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array | None:
    """softmax(queries · keysᵀ · scale under the mask) · values, as `mx.fast.scaled_dot_product_attention` defines it,
    for float32 [B, heads, N, d] and [B, kv heads, columns, d]. A mask is "causal", or truth values or summands that
    spread over [B, heads, N, columns]. None for what is left to MLX: other dtypes, and a mask for each head."""
    if not queries.dtype == keys.dtype == values.dtype == mx.float32:
        return None
    count, columns = queries.shape[2], keys.shape[2]
    if isinstance(mask, mx.array):
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        if mask.shape[1] != 1:
            return None
    elif mask is not None:
        mask = (mx.arange(columns) <= mx.arange(columns - count, columns)[:, None])[None, None]
    return _in_parts(queries, keys, values, scale, mask)


def _in_parts(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """`_attend` of few enough rows, or of few enough queries of one row, at once."""
    axis = 0 if len(queries) > 1 else 2
    there = queries.shape[axis]
    if there == 1 or math.prod(queries.shape[:3]) * keys.shape[2] <= SCORES:
        return _attend(queries, keys, values, scale, mask)
    found = []
    for half in (slice(0, there // 2), slice(there // 2, there)):
        part = (half,) if axis == 0 else (slice(None), slice(None), half)
        own = mask if mask is None or mask.shape[axis] == 1 else mask[part]
        read = (keys[half], values[half]) if axis == 0 else (keys, values)
        found.append(_in_parts(queries[part], *read, scale, own))
    return mx.concatenate(found, axis=axis)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """`attend` in one piece, for a mask [1 or B, 1, 1 or N, columns]."""
    batch, heads, count, width = queries.shape
    kv_heads, columns = keys.shape[1:3]
    # Heads that share keys are rows of one product.
    shared = (batch, kv_heads, heads // kv_heads * count)
    scores = (queries * scale).reshape(*shared, width) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(batch, kv_heads, -1, count, columns)
    if mask is not None:
        mask = mask[:, :, None]
        scores = mx.where(mask, scores, LOWEST) if mask.dtype == mx.bool_ else scores + mask
    weights = exponential(scores - mx.max(scores, axis=-1, keepdims=True))
    total = mx.sum(weights, axis=-1, keepdims=True)
    found = (weights.reshape(*shared, columns) @ values).reshape(batch, kv_heads, -1, count, values.shape[-1])
    return (found / total).reshape(batch, heads, count, -1)


def swiglu(gate: mx.array, x: mx.array) -> mx.array | None:
    """silu(gate) · x in float32; None for other dtypes."""
    if not gate.dtype == x.dtype == mx.float32:
        return None
    return gate * x / (1.0 + exponential(mx.minimum(-gate, LARGEST)))
