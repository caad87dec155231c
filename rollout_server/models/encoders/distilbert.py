"""DistilBERT (arXiv:1910.01108): BERT's layers under other names, without token types, with one epsilon for all."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend, split_heads, tokens_kept

EPSILON = 1e-12
"""transformers has it in the code, and not in config.json."""


@dataclass(frozen=True, slots=True)
class DistilBertArgs:
    """Fields of config.json that the code computes with."""

    vocab_size: int
    max_position_embeddings: int
    n_layers: int
    n_heads: int
    dim: int
    hidden_dim: int
    activation: str
    pad_token_id: int | None

    type_vocab_size = 0

    @property
    def hidden_size(self) -> int:
        return self.dim

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings


class Embeddings(nn.Module):
    def __init__(self, args: DistilBertArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.position_embeddings = nn.Embedding(args.max_position_embeddings, args.dim)
        self.LayerNorm = nn.LayerNorm(args.dim, eps=EPSILON)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(mx.arange(ids.shape[1])))


class SelfAttention(nn.Module):
    def __init__(self, args: DistilBertArgs) -> None:
        super().__init__()
        self._heads = args.n_heads
        self.q_lin = nn.Linear(args.dim, args.dim)
        self.k_lin = nn.Linear(args.dim, args.dim)
        self.v_lin = nn.Linear(args.dim, args.dim)
        self.out_lin = nn.Linear(args.dim, args.dim)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.q_lin, self.k_lin, self.v_lin))
        return self.out_lin(attend(q, k, v, mask))


class FeedForward(nn.Module):
    def __init__(self, args: DistilBertArgs) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[args.activation]
        self.lin1 = nn.Linear(args.dim, args.hidden_dim)
        self.lin2 = nn.Linear(args.hidden_dim, args.dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lin2(self._activation(self.lin1(x)))


class Block(nn.Module):
    def __init__(self, args: DistilBertArgs) -> None:
        super().__init__()
        self.attention = SelfAttention(args)
        self.sa_layer_norm = nn.LayerNorm(args.dim, eps=EPSILON)
        self.ffn = FeedForward(args)
        self.output_layer_norm = nn.LayerNorm(args.dim, eps=EPSILON)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.sa_layer_norm(self.attention(x, mask) + x)
        return self.output_layer_norm(self.ffn(x) + x)


class Transformer(nn.Module):
    def __init__(self, args: DistilBertArgs) -> None:
        super().__init__()
        self.layer = [Block(args) for _ in range(args.n_layers)]


class DistilBertBody(nn.Module):
    """ids int32 [B, N], int32 [B] lengths → states [B, N, dim]; what stands behind a row's length is padding."""

    def __init__(self, args: DistilBertArgs) -> None:
        super().__init__()
        self.embeddings = Embeddings(args)
        self.transformer = Transformer(args)

    def __call__(
        self, ids: mx.array, types: mx.array | None = None, lengths: mx.array | None = None, *, mixed: bool = False
    ) -> mx.array:
        kept = tokens_kept(lengths, ids.shape[1])
        mask = None if kept is None else kept[:, None, None]
        x = self.embeddings(ids)
        for layer in self.transformer.layer:
            x = layer(x, mask)
        return x
