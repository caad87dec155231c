"""An LSTM language model (Hochreiter and Schmidhuber, 1997): embeddings, layers as `torch.nn.LSTM` has them, a head.

There is no configuration of the field's for one, so this is ours; `from_torch` writes it. A file holds

    model.embed_tokens.weight                                     [vocabulary, embedding_size]
    model.layers.N.weight_ih, weight_hh, bias_ih, bias_hh         torch's, gates in the order i, f, g, o
    lm_head.weight, and lm_head.bias if there is one              [vocabulary, hidden_size]; none where they are tied

Both products of a layer are linear layers here, `model.layers.N.ih` and `.hh`, so that versions may adapt them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import ArraysCache

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head"
IN_FILE = re.compile(r"(model\.layers\.\d+)\.(weight|bias)_(ih|hh)")


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    embedding_size: int | None = None
    """`hidden_size` if it is not said."""
    bias: bool = True
    """Each layer adds two, as torch's does."""
    head_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        self.embedding_size = self.embedding_size or self.hidden_size
        if self.tie_word_embeddings and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"embedding_size is {self.embedding_size} and hidden_size {self.hidden_size}, so that the head cannot "
                "share the embedding's weight (tie_word_embeddings)"
            )
        if self.tie_word_embeddings and self.head_bias:
            raise ValueError("a head that shares the embedding's weight (tie_word_embeddings) has no head_bias")


class LSTMLayer(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.ih = nn.Linear(width, 4 * hidden, bias=bias)
        self.hh = nn.Linear(hidden, 4 * hidden, bias=bias)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """x [B, N, width] → [B, N, hidden]. The cache holds the last output and, in float32, the cell, [B, hidden].
        Positions beyond a row's length leave its state as it is."""
        given = self.ih(x)
        size = given.shape[-1] // 4
        h, c = (cache[0], cache[1]) if cache is not None else (None, None)
        if h is None or c is None:
            h, c = mx.zeros((x.shape[0], size), given.dtype), mx.zeros((x.shape[0], size))
        mask = cache.make_mask(x.shape[1]) if cache is not None else None
        outputs = []
        for at in range(x.shape[1]):
            i, f, g, o = mx.split(given[:, at] + self.hh(h[:, None])[:, 0], 4, axis=-1)
            cell = mx.sigmoid(f) * c + mx.sigmoid(i) * mx.tanh(g)
            output = (mx.sigmoid(o) * mx.tanh(cell)).astype(h.dtype)
            if mask is not None:
                own = mask[:, at, None]
                cell, output = mx.where(own, cell, c), mx.where(own, output, h)
            h, c = output, cell
            outputs.append(h)
        if cache is not None:
            cache[0], cache[1] = h, c
            cache.advance(x.shape[1])
        return mx.stack(outputs, axis=1)


class LSTM(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width = args.embedding_size or args.hidden_size
        self.embed_tokens = nn.Embedding(args.vocab_size, width)
        self.layers = [
            LSTMLayer(args.hidden_size if at else width, args.hidden_size, args.bias)
            for at in range(args.num_hidden_layers)
        ]

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.embed_tokens(tokens)
        for layer, own in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x = layer(x, own)
        return x


class Model(nn.Module):
    """tokens int32 [B, N] → logits [B, N, vocabulary]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = LSTM(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=args.head_bias)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.model(tokens, cache)
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    @property
    def layers(self) -> list[LSTMLayer]:
        return self.model.layers

    def make_cache(self) -> list[ArraysCache]:
        return [ArraysCache(2) for _ in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        found = {parameter_name(name): value for name, value in weights.items()}
        if self.args.tie_word_embeddings:
            found.pop(f"{HEAD}.weight", None)
        return found


def parameter_name(name: str) -> str:
    """What a tensor of a file is called among the model's parameters."""
    return IN_FILE.sub(r"\1.\3.\2", name)
