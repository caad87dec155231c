"""BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692) and XLM-R (arXiv:1911.02116): one body, which counts positions
from zero or behind the pad id, and three kinds of heads."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend, split_heads, tokens_kept

BEHIND_PADDING = frozenset({"roberta", "xlm-roberta"})
"""Model types whose first position is the pad id + 1, and whose pad tokens have the position of the pad id."""


@dataclass(frozen=True, slots=True)
class BertArgs:
    """Fields of config.json that the code computes with."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    pad_token_id: int | None

    @property
    def max_tokens(self) -> int:
        behind = self.model_type in BEHIND_PADDING
        return self.max_position_embeddings - (self.pad_token_id + 1 if behind and self.pad_token_id is not None else 0)


class BertEmbeddings(nn.Module):
    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self._pad = args.pad_token_id if args.model_type in BEHIND_PADDING else None
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.position_embeddings = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.token_type_embeddings = nn.Embedding(args.type_vocab_size, args.hidden_size)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, ids: mx.array, types: mx.array | None) -> mx.array:
        types = mx.zeros_like(ids) if types is None else types
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        return self.LayerNorm(x + self.position_embeddings(self._positions(ids)))

    def _positions(self, ids: mx.array) -> mx.array:
        if self._pad is None:
            return mx.arange(ids.shape[1])
        counted = (ids != self._pad).astype(mx.int32)
        return mx.cumsum(counted, axis=1) * counted + self._pad


class BertSelfAttention(nn.Module):
    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self._heads = args.num_attention_heads
        self.query = nn.Linear(args.hidden_size, args.hidden_size)
        self.key = nn.Linear(args.hidden_size, args.hidden_size)
        self.value = nn.Linear(args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.query, self.key, self.value))
        return attend(q, k, v, mask)


class Residual(nn.Module):
    """LayerNorm(x · W + b + what came in), as BERT and DeBERTa close both halves of a layer."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)

    def __call__(self, x: mx.array, before: mx.array) -> mx.array:
        return self.LayerNorm(self.dense(x) + before)


class BertAttention(nn.Module):
    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.self = BertSelfAttention(args)
        self.output = Residual(args.hidden_size, args.hidden_size, args.layer_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        return self.output(self["self"](x, mask), x)


class Intermediate(nn.Module):
    """The wide half of a feed-forward layer, of BERT and of DeBERTa."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[activation]
        self.dense = nn.Linear(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self._activation(self.dense(x))


class BertLayer(nn.Module):
    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.attention = BertAttention(args)
        self.intermediate = Intermediate(args.hidden_size, args.intermediate_size, args.hidden_act)
        self.output = Residual(args.intermediate_size, args.hidden_size, args.layer_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.layer = [BertLayer(args) for _ in range(args.num_hidden_layers)]


class BertBody(nn.Module):
    """ids int32 [B, N], token types likewise, int32 [B] lengths → states [B, N, hidden]; what stands behind a row's
    length is padding."""

    def __init__(self, args: BertArgs) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(args)
        self.encoder = BertEncoder(args)

    def __call__(
        self, ids: mx.array, types: mx.array | None = None, lengths: mx.array | None = None, *, mixed: bool = False
    ) -> mx.array:
        kept = tokens_kept(lengths, ids.shape[1])
        mask = None if kept is None else kept[:, None, None]
        x = self.embeddings(ids, types)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x
