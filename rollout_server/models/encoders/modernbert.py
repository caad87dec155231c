"""ModernBERT (arXiv:2412.13663): rotary positions with a theta for each kind of layer, norms before the halves of a
layer, gated feed-forward layers, and layers that see a window only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend, tokens_kept

FULL, LOCAL = "full_attention", "sliding_attention"


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

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        qkv = self.Wqkv(x).reshape(*x.shape[:2], 3, self._heads, self._head)
        q, k, v = (qkv[:, :, part].swapaxes(1, 2) for part in range(3))
        return self.Wo(attend(self._turned(q), self._turned(k), v, mask))

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

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = x + self.attn(self.attn_norm(x), mask)
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
        masks = {FULL: None if kept is None else kept[:, None, None], LOCAL: self._window(kept, width)}
        x = self.embeddings(ids)
        for kind, layer in zip(self._kinds, self.layers, strict=True):
            x = layer(x, masks[kind])
        return self.final_norm(x)

    def _window(self, kept: mx.array | None, width: int) -> mx.array | None:
        """Keys no further away than the window reaches on either side, for a query [B or 1, 1, N, N]."""
        if width <= self._reach + 1:
            return None if kept is None else kept[:, None, None]
        columns = mx.arange(width)
        away = mx.abs(columns[:, None] - columns[None])
        near = (away <= self._reach)[None, None]
        # Padding sees itself, as a query far behind the last token would otherwise have no key at all.
        return near if kept is None else near & (kept[:, None, None] | (away == 0))
