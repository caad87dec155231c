"""What the attention of every encoder shares: heads, and masks of padded batches."""

from __future__ import annotations

import math

import mlx.core as mx

SCORES = 2**26
"""Products of queries and keys that are alive at once where a whole picture is read, 256 MB in float32."""


def split_heads(x: mx.array, heads: int) -> mx.array:
    """[B, N, heads · d] → [B, heads, N, d]."""
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(1, 2)


def joined_heads(x: mx.array) -> mx.array:
    """[B, heads, N, d] → [B, N, heads · d]."""
    return x.swapaxes(1, 2).flatten(-2)


def tokens_kept(lengths: mx.array | None, width: int) -> mx.array | None:
    """bool [B, width]: which columns hold tokens, for int [B] lengths; None where every one does."""
    return None if lengths is None else mx.arange(width) < lengths[:, None]


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, scale: float | None = None) -> mx.array:
    """softmax(q · kᵀ · scale + mask) · v for [B, heads, N, d], joined → [B, N, heads · d]. A mask is of truth
    values, or is added; `scale` is 1 / √d unless it is given. Every query has to have a key: a row of NaN would
    spread."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return joined_heads(mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask))


def attend_in_parts(q: mx.array, k: mx.array, v: mx.array, most: int = SCORES) -> mx.array:
    """As `attend` without a mask, some queries after others, so that at most about `most` scores are alive: a query's
    softmax asks no other query."""
    queries = max(1, most // (q.shape[0] * q.shape[1] * k.shape[2]))
    if queries >= q.shape[2]:
        return attend(q, k, v, None)
    parts = []
    for at in range(0, q.shape[2], queries):
        parts.append(attend(q[:, :, at : at + queries], k, v, None))
        # Evaluated one by one: what MLX runs as one graph it gives memory all at once.
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)
