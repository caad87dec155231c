"""What the attention of every encoder shares: heads, masks of padded batches, and the activations of configurations."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

Activation = Callable[[mx.array], mx.array]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": nn.gelu,
    "gelu_python": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_fast": nn.gelu_approx,
    "gelu_accurate": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_python_tanh": nn.gelu_approx,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": nn.mish,
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
}
"""transformers' names, of functions that act on each value by itself."""


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
