"""ModernBERT (arXiv:2412.13663): rotary positions with a theta for each kind of layer, norms before the halves of a
layer, gated feed-forward layers, and layers that see a window only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend, tokens_kept

FULL, LOCAL = "full_attention", "sliding_attention"
WIDE = 4
"""Reaches of a window in a sequence from which on blocks are less work than a mask: each of them reads three."""

Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
"""Queries, keys and values [B, heads, N, d] → [B, N, heads · d]."""


@dataclass(frozen=True, slots=True)
class ModernBertArgs:
    """Fields of config.json that the code computes with."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_activation: str
    max_position_embeddings: int
    norm_eps: float
    norm_bias: bool
    pad_token_id: int | None
    attention_bias: bool
    mlp_bias: bool
    layer_types: list[str]
    rope_parameters: Mapping[str, Mapping[str, Any]]
    local_attention: int
    classifier_pooling: str
    classifier_bias: bool
    classifier_activation: str

    type_vocab_size = 0

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings

    def norm(self) -> nn.LayerNorm:
        return nn.LayerNorm(self.hidden_size, eps=self.norm_eps, bias=self.norm_bias)


class Embeddings(nn.Module):
    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.norm = args.norm()

    def __call__(self, ids: mx.array) -> mx.array:
        return self.norm(self.tok_embeddings(ids))


class Attention(nn.Module):
    def __init__(self, args: ModernBertArgs, kind: str) -> None:
        super().__init__()
        self._heads = args.num_attention_heads
        self._head = args.hidden_size // args.num_attention_heads
        # 1 / theta^(-2i/d): with it, MLX turns by the very angles that torch computes from its inverse.
        powers = mx.arange(0, self._head, 2, dtype=mx.float32) / self._head
        self._freqs = mx.array(args.rope_parameters[kind]["rope_theta"], mx.float32) ** powers
        self.Wqkv = nn.Linear(args.hidden_size, 3 * args.hidden_size, bias=args.attention_bias)
        self.Wo = nn.Linear(args.hidden_size, args.hidden_size, bias=args.attention_bias)

    def __call__(self, x: mx.array, attend_as: Attend) -> mx.array:
        qkv = self.Wqkv(x).reshape(*x.shape[:2], 3, self._heads, self._head)
        q, k, v = (qkv[:, :, part].swapaxes(1, 2) for part in range(3))
        return self.Wo(attend_as(self._turned(q), self._turned(k), v))

    def _turned(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self._head, traditional=False, base=None, scale=1.0, offset=0, freqs=self._freqs)


class FeedForward(nn.Module):
    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[args.hidden_activation]
        self.Wi = nn.Linear(args.hidden_size, 2 * args.intermediate_size, bias=args.mlp_bias)
        self.Wo = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.Wi(x), 2, axis=-1)
        return self.Wo(self._activation(value) * gate)


class Layer(nn.Module):
    def __init__(self, args: ModernBertArgs, index: int) -> None:
        super().__init__()
        # The embeddings are normed already.
        self.attn_norm = args.norm() if index else nn.Identity()
        self.attn = Attention(args, args.layer_types[index])
        self.mlp_norm = args.norm()
        self.mlp = FeedForward(args)

    def __call__(self, x: mx.array, attend_as: Attend) -> mx.array:
        x = x + self.attn(self.attn_norm(x), attend_as)
        return x + self.mlp(self.mlp_norm(x))


class ModernBertBody(nn.Module):
    """ids int32 [B, N], int32 [B] lengths → states [B, N, hidden] after the final norm; what stands behind a row's
    length is padding."""

    def __init__(self, args: ModernBertArgs) -> None:
        super().__init__()
        self._kinds = tuple(args.layer_types)
        self._reach = args.local_attention // 2
        self.embeddings = Embeddings(args)
        self.layers = [Layer(args, index) for index in range(args.num_hidden_layers)]
        self.final_norm = args.norm()

    def __call__(
        self, ids: mx.array, types: mx.array | None = None, lengths: mx.array | None = None, *, mixed: bool = False
    ) -> mx.array:
        width = ids.shape[1]
        kept = tokens_kept(lengths, width)
        full = partial(attend, mask=None if kept is None else kept[:, None, None])
        attend_as = {FULL: full, LOCAL: window(kept, width, self._reach) if width > self._reach + 1 else full}
        x = self.embeddings(ids)
        for kind, layer in zip(self._kinds, self.layers, strict=True):
            x = layer(x, attend_as[kind])
        return self.final_norm(x)


def window(kept: mx.array | None, width: int, reach: int) -> Attend:
    """Attention to keys at most `reach` away, for bool [B, width] columns that hold tokens."""
    if reach > 0 and width >= WIDE * reach:
        return Blocks.of(kept, width, reach)
    columns = mx.arange(width)
    away = mx.abs(columns[:, None] - columns[None])
    near = (away <= reach)[None, None]
    # Padding sees itself, as a query far behind the last token would otherwise have no key at all.
    return partial(attend, mask=near if kept is None else near & (kept[:, None, None] | (away == 0)))


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The same for long sequences, whose queries see few of the keys: in blocks as long as the window reaches, each of
    which attends to itself and to its neighbours, so that the work grows with the length and not with its square."""

    size: int
    count: int
    mask: mx.array
    """bool [B or 1, count, 1, size, 3 · size]"""

    @classmethod
    def of(cls, kept: mx.array | None, width: int, reach: int) -> Blocks:
        count = -(-width // reach)
        kept = mx.ones((1, width), mx.bool_) if kept is None else kept
        known = _neighbours(mx.pad(kept, [(0, 0), (0, count * reach - width)])[:, None, :, None], reach)[:, 0, ..., 0]
        away = mx.arange(3 * reach)[None] - reach - mx.arange(reach)[:, None]
        near = mx.abs(away) <= reach
        return cls(reach, count, (near & (known[:, :, None] | (away == 0)))[:, :, None])

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """For [B, heads, N, d] → [B, N, heads · d]."""
        batch, heads, width, head = q.shape
        q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, self.count * self.size - width), (0, 0)]) for x in (q, k, v))
        own = q.reshape(batch, heads, self.count, self.size, head)
        parts = (own, _neighbours(k, self.size), _neighbours(v, self.size))
        # A block is a row of a batch of its own.
        q, k, v = (part.swapaxes(1, 2).flatten(0, 1) for part in parts)
        mask = mx.broadcast_to(self.mask, (batch, *self.mask.shape[1:])).flatten(0, 1)
        return attend(q, k, v, mask).reshape(batch, -1, heads * head)[:, :width]


def _neighbours(x: mx.array, size: int) -> mx.array:
    """[B, heads, count · size, d] → [B, heads, count, 3 · size, d]: each block between the ones before and after it,
    which are zero where there is none."""
    around = mx.pad(x, [(0, 0), (0, 0), (size, size), (0, 0)])
    blocks = around.reshape(*x.shape[:2], -1, size, x.shape[-1])
    return mx.concatenate([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], axis=3)
