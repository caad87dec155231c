"""DeBERTa v2 and v3 (arXiv:2006.03654, arXiv:2111.09543): content and relative position attend to each other, distances
in buckets that grow with their logarithm, and a convolution beside the first layer where there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend, split_heads, tokens_kept
from rollout_server.models.encoders.bert import Intermediate, Residual


@dataclass(frozen=True, slots=True)
class DebertaV2Args:
    """Fields of config.json that the code computes with. The last ones have their defaults in transformers' code."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    relative_attention: bool
    max_relative_positions: int
    pad_token_id: int | None
    position_biased_input: bool
    pooler_hidden_act: str
    pos_att_type: list[str] | None = None
    position_buckets: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    embedding_size: int | None = None

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings

    @property
    def pairs(self) -> frozenset[str]:
        """What attends beside content to content: `c2p`, content to position, and `p2c`."""
        return frozenset(self.pos_att_type or ()) & {"c2p", "p2c"}

    @property
    def furthest(self) -> int:
        """Relative positions that the largest bucket stands for, or that there are without buckets."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """The table of relative positions has one row for each of −span … span − 1."""
        return self.position_buckets if self.position_buckets > 0 else self.furthest

    @property
    def norms_table(self) -> bool:
        return "layer_norm" in [part.strip() for part in self.norm_rel_ebd.lower().split("|")]

    def rows(self, width: int) -> np.ndarray:
        """int32 [2 · width − 1]: the row of the table for the distances query − key of 1 − width … width − 1."""
        distances = np.arange(1 - width, width)
        if self.position_buckets > 0:
            distances = log_bucket(distances, self.position_buckets, self.furthest)
        return np.clip(distances + self.span, 0, 2 * self.span - 1).astype(np.int32)


def log_bucket(distances: np.ndarray, buckets: int, furthest: int) -> np.ndarray:
    """Distances up to half the buckets for themselves, the rest by their logarithm, in float32 as transformers has it:
    a value just above a whole number falls into the next bucket."""
    half = buckets // 2
    far = np.where(np.abs(distances) < half, half - 1, np.abs(distances)).astype(np.float32)
    # float64 and then rounded is what a good float32 logarithm gives, whichever library has it.
    logs = np.log((far / np.float32(half)).astype(np.float64)).astype(np.float32)
    largest = np.float32(math.log(np.float32((furthest - 1) / half)))
    bucket = np.ceil(logs / largest * np.float32(half - 1)) + half
    return np.where(np.abs(distances) <= half, distances, bucket * np.sign(distances)).astype(np.int64)


class DebertaEmbeddings(nn.Module):
    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        width = args.embedding_size or args.hidden_size
        self.word_embeddings = nn.Embedding(args.vocab_size, width)
        if args.position_biased_input:
            self.position_embeddings = nn.Embedding(args.max_position_embeddings, width)
        if args.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(args.type_vocab_size, width)
        if width != args.hidden_size:
            self.embed_proj = nn.Linear(width, args.hidden_size, bias=False)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, ids: mx.array, types: mx.array | None) -> mx.array:
        x = self.word_embeddings(ids)
        if "position_embeddings" in self:
            x = x + self.position_embeddings(mx.arange(ids.shape[1]))
        if "token_type_embeddings" in self:
            x = x + self.token_type_embeddings(mx.zeros_like(ids) if types is None else types)
        return self.LayerNorm(self.embed_proj(x) if "embed_proj" in self else x)


class DisentangledSelfAttention(nn.Module):
    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        self._heads = args.num_attention_heads
        self._pairs = args.pairs if args.relative_attention else frozenset()
        self._scale = 1 / math.sqrt(args.hidden_size // args.num_attention_heads * (1 + len(args.pairs)))
        self.query_proj = nn.Linear(args.hidden_size, args.hidden_size)
        self.key_proj = nn.Linear(args.hidden_size, args.hidden_size)
        self.value_proj = nn.Linear(args.hidden_size, args.hidden_size)
        if not args.share_att_key and "c2p" in self._pairs:
            self.pos_key_proj = nn.Linear(args.hidden_size, args.hidden_size)
        if not args.share_att_key and "p2c" in self._pairs:
            self.pos_query_proj = nn.Linear(args.hidden_size, args.hidden_size)

    def __call__(self, x: mx.array, kept: mx.array | None, table: mx.array | None, rows: mx.array) -> mx.array:
        """`table` [1 or B, R, hidden]: rows of relative positions; `rows` [2N − 1]: which of them each distance has."""
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.query_proj, self.key_proj, self.value_proj))
        mask = None if kept is None else kept[:, None, None]
        if table is not None and self._pairs:
            bias = self._bias(q, k, table, rows) * self._scale
            mask = bias if mask is None else mx.where(mask, bias, mx.array(-math.inf, bias.dtype))
        return attend(q, k, v, mask, self._scale)

    def _bias(self, q: mx.array, k: mx.array, table: mx.array, rows: mx.array) -> mx.array:
        """What relative positions add to the products of queries and keys, [B, heads, N, N], before the scale."""
        found = []
        if "c2p" in self._pairs:
            keys = self._placed("pos_key_proj" if "pos_key_proj" in self else "key_proj", table, rows[::-1])
            found.append(_diagonals(q @ keys.swapaxes(-1, -2)))
        if "p2c" in self._pairs:
            queries = self._placed("pos_query_proj" if "pos_query_proj" in self else "query_proj", table, rows)
            found.append(_diagonals(k @ queries.swapaxes(-1, -2)).swapaxes(-1, -2))
        return found[0] if len(found) == 1 else found[0] + found[1]

    def _placed(self, layer: str, table: mx.array, rows: mx.array) -> mx.array:
        """A projection of the table with a row for every distance, [1 or B, heads, 2N − 1, d]."""
        return split_heads(self[layer](table)[:, rows], self._heads)


def _diagonals(x: mx.array) -> mx.array:
    """[B, heads, N, 2N − 1] → [B, heads, N, N]: row i from its column N − 1 − i on, so that a column of `x` is a
    diagonal of the result."""
    batch, heads, width, columns = x.shape
    strides = (heads * width * columns, width * columns, columns - 1, 1)
    return mx.as_strided(x, (batch, heads, width, width), strides, width - 1)


class DebertaAttention(nn.Module):
    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        self.self = DisentangledSelfAttention(args)
        self.output = Residual(args.hidden_size, args.hidden_size, args.layer_norm_eps)

    def __call__(self, x: mx.array, kept: mx.array | None, table: mx.array | None, rows: mx.array) -> mx.array:
        return self.output(self["self"](x, kept, table, rows), x)


class DebertaLayer(nn.Module):
    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        self.attention = DebertaAttention(args)
        self.intermediate = Intermediate(args.hidden_size, args.intermediate_size, args.hidden_act)
        self.output = Residual(args.intermediate_size, args.hidden_size, args.layer_norm_eps)

    def __call__(self, x: mx.array, kept: mx.array | None, table: mx.array | None, rows: mx.array) -> mx.array:
        x = self.attention(x, kept, table, rows)
        return self.output(self.intermediate(x), x)


class Convolution(nn.Module):
    """Over the embeddings, added to what the first layer gives. Padding is zero before it and after it."""

    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[args.conv_act]
        size, groups = args.conv_kernel_size, args.conv_groups
        self.conv = nn.Conv1d(args.hidden_size, args.hidden_size, size, padding=(size - 1) // 2, groups=groups)
        self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)

    def __call__(self, embeddings: mx.array, x: mx.array, kept: mx.array | None) -> mx.array:
        if kept is None:
            return self.LayerNorm(x + self._activation(self.conv(embeddings)))
        kept = kept[..., None]
        added = self._activation(mx.where(kept, self.conv(mx.where(kept, embeddings, 0)), 0))
        return mx.where(kept, self.LayerNorm(x + added), 0)


class DebertaEncoder(nn.Module):
    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        self._args = args
        self.layer = [DebertaLayer(args) for _ in range(args.num_hidden_layers)]
        if args.relative_attention:
            self.rel_embeddings = nn.Embedding(2 * args.span, args.hidden_size)
        if args.norms_table:
            self.LayerNorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)
        if args.conv_kernel_size > 0:
            self.conv = Convolution(args)

    def __call__(self, x: mx.array, kept: mx.array | None, *, mixed: bool) -> mx.array:
        embeddings, (table, rows) = x, self._positions(x.shape[1], x.shape[0] if mixed else 1)
        for index, layer in enumerate(self.layer):
            x = layer(x, kept, table, rows)
            if index == 0 and "conv" in self:
                x = self.conv(embeddings, x, kept)
        return x

    def _positions(self, width: int, copies: int) -> tuple[mx.array | None, mx.array]:
        """The part of the table that distances in a sequence of this width have, [copies, R, hidden], and the row in
        it of each of them."""
        if "rel_embeddings" not in self:
            return None, mx.zeros(0, mx.int32)
        rows = self._args.rows(width)
        low, high = int(rows.min()), int(rows.max())
        table = self.rel_embeddings.weight[low : high + 1]
        table = self["LayerNorm"](table) if "LayerNorm" in self else table
        return mx.broadcast_to(table[None], (copies, *table.shape)), mx.array(rows - low)


class DebertaV2Body(nn.Module):
    """ids int32 [B, N], token types likewise, int32 [B] lengths → states [B, N, hidden]; what stands behind a row's
    length is padding. `mixed`: rows run on different adapters, which then see the table of positions once a row."""

    def __init__(self, args: DebertaV2Args) -> None:
        super().__init__()
        self.embeddings = DebertaEmbeddings(args)
        self.encoder = DebertaEncoder(args)

    def __call__(
        self, ids: mx.array, types: mx.array | None = None, lengths: mx.array | None = None, *, mixed: bool = False
    ) -> mx.array:
        return self.encoder(self.embeddings(ids, types), tokens_kept(lengths, ids.shape[1]), mixed=mixed)
