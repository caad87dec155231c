"""A softmax and a gate whose exponentials are computed number by number nowhere.

MLX's exp on the CPU is scalar: 19 ns a number on x86, where `numerics.exponential` takes 5. Attention and SwiGLU ask
for so many that they were a third of a forward (docs/figures.md)."""

from __future__ import annotations

import mlx.core as mx

from rollout_server.engine.sampling.numerics import LARGEST, exponential

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
    batch, heads, count, width = queries.shape
    kv_heads, columns = keys.shape[1:3]
    if isinstance(mask, mx.array):
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        if mask.shape[1] != 1:
            return None
        mask = mask[:, :, None]
    elif mask is not None:
        mask = mx.arange(columns) <= mx.arange(columns - count, columns)[:, None]
    # Heads that share keys are rows of one product.
    shared = (batch, kv_heads, heads // kv_heads * count)
    scores = (queries * scale).reshape(*shared, width) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(batch, kv_heads, -1, count, columns)
    if mask is not None:
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
