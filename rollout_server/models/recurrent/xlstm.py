"""xLSTM (arXiv:2405.04517, arXiv:2503.13427): blocks of an mLSTM and a feed-forward layer, as transformers' `xlstm`
computes them; parameters have its names.

An mLSTM keeps a matrix C of values by keys, a vector n of keys and a number m, by which both are scaled so that no
exponential overflows. It is read in chunks: within one every token attends to those before it, and what came before the
chunk is in the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import ArraysCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    use_bias: bool = False
    norm_eps: float = 1e-6
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    chunk_size: int = 64
    eps: float = 1e-6
    ffn_proj_factor: float = 2.667
    ffn_round_up_to_multiple_of: int = 64
    gate_soft_cap: float | None = 15.0
    output_logit_soft_cap: float | None = 30.0
    weight_mode: str = "single"

    @property
    def keys(self) -> int:
        return int(self.hidden_size * self.qk_dim_factor)

    @property
    def values(self) -> int:
        return int(self.hidden_size * self.v_dim_factor)

    @property
    def feed(self) -> int:
        multiple = self.ffn_round_up_to_multiple_of
        return int((self.hidden_size * self.ffn_proj_factor + multiple - 1) // multiple * multiple)

    @property
    def fused(self) -> bool:
        return self.weight_mode == "fused"


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """C [B, heads, keys, values], n [B, heads, keys] and m [B, heads, 1] in float32, C and n scaled by exp(-m)."""

    c: mx.array
    n: mx.array
    m: mx.array


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A few tokens of every head in float32: queries, keys and values [B, heads, N, size], gates [B, heads, N], as they
    are before sigmoid and exp."""

    q: mx.array
    k: mx.array
    v: mx.array
    i: mx.array
    f: mx.array


def read_chunk(chunk: Chunk, state: State, eps: float) -> tuple[mx.array, State]:
    """What the tokens of a chunk give [B, heads, N, values], and the state behind them."""
    log_f = -mx.logaddexp(0.0, -chunk.f)
    passed = mx.cumsum(log_f, axis=-1)
    q = chunk.q * chunk.q.shape[-1] ** -0.5
    # Log-weights of token s for token t: its input gate, and the forget gates between them.
    length = chunk.i.shape[-1]
    weights = passed[..., :, None] - passed[..., None, :] + chunk.i[..., None, :]
    weights = mx.where(mx.tril(mx.ones((length, length), mx.bool_)), weights, -mx.inf)
    before = passed + state.m
    scale = mx.maximum(before, weights.max(axis=-1))[..., None]
    within = (q @ chunk.k.swapaxes(-1, -2)) * mx.exp(weights - scale)
    across = q * mx.exp(before[..., None] - scale)
    above = across @ state.c + within @ chunk.v
    below = across @ state.n[..., None] + within.sum(axis=-1, keepdims=True)
    found = above / (mx.maximum(mx.abs(below), mx.exp(-scale)) + eps)
    return found, _behind(chunk, passed, state)


def _behind(chunk: Chunk, passed: mx.array, state: State) -> State:
    whole = passed[..., -1:]
    gains = whole - passed + chunk.i
    m = mx.maximum(whole + state.m, gains.max(axis=-1, keepdims=True))
    keys = chunk.k * mx.exp(gains - m)[..., None]
    kept = mx.exp(whole + state.m - m)
    c = kept[..., None] * state.c + keys.swapaxes(-1, -2) @ chunk.v
    return State(c, kept * state.n + keys.sum(axis=-2), m)


def soft_cap(x: mx.array, cap: float | None) -> mx.array:
    return x if cap is None else cap * mx.tanh(x / cap)


class Norm(nn.Module):
    """The root mean square of the last axis; with a bias where the model has biases."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        if bias:
            self.bias = mx.zeros((width,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        found = mx.fast.rms_norm(x, self.weight, self._eps)
        return found + self.bias if "bias" in self else found


class HeadNorm(nn.Module):
    """Every head by itself is centred and scaled: [B, N, heads, size] → [B, N, heads · size]."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        if bias:
            self.bias = mx.zeros((width,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        found = mx.fast.layer_norm(x, None, None, self._eps).flatten(-2) * self.weight
        return found + self.bias if "bias" in self else found


class MLSTM(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, bias = args.hidden_size, args.use_bias
        self._args = args
        if args.fused:
            self.qkv_opreact = nn.Linear(width, 2 * args.keys + 2 * args.values, bias=bias)
            self.ifgate_preact = nn.Linear(width, 2 * args.num_heads)
        else:
            self.q = nn.Linear(width, args.keys, bias=bias)
            self.k = nn.Linear(width, args.keys, bias=bias)
            self.v = nn.Linear(width, args.values, bias=bias)
            self.ogate_preact = nn.Linear(width, args.values, bias=bias)
            self.igate_preact = nn.Linear(width, args.num_heads)
            self.fgate_preact = nn.Linear(width, args.num_heads)
        self.multihead_norm = HeadNorm(args.values, args.norm_eps, bias)
        self.out_proj = nn.Linear(args.values, width, bias=bias)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        length = x.shape[1]
        tokens, o = self._inputs(x, cache.make_mask(length) if cache is not None else None)
        state, found = self._state(tokens, cache), []
        for start in range(0, length, self._args.chunk_size):
            part = slice(start, start + self._args.chunk_size)
            chunk = Chunk(*(array[:, :, part] for array in (tokens.q, tokens.k, tokens.v, tokens.i, tokens.f)))
            h, state = read_chunk(chunk, state, self._args.eps)
            found.append(h)
        if cache is not None:
            cache[0], cache[1], cache[2] = state.c, state.n, state.m
            cache.advance(length)
        h = mx.concatenate(found, axis=2).swapaxes(1, 2).astype(x.dtype)
        return self.out_proj(mx.sigmoid(o) * self.multihead_norm(h))

    def _inputs(self, x: mx.array, mask: mx.array | None) -> tuple[Chunk, mx.array]:
        """All tokens as one chunk, and the output gate [B, N, values]. A position beyond a row's length gives nothing
        and forgets nothing."""
        args = self._args
        if args.fused:
            q, k, v, o = mx.split(self.qkv_opreact(x), [args.keys, 2 * args.keys, 2 * args.keys + args.values], axis=-1)
            i, f = mx.split(soft_cap(self.ifgate_preact(x), args.gate_soft_cap), 2, axis=-1)
        else:
            q, k, v, o = self.q(x), self.k(x), self.v(x), self.ogate_preact(x)
            i, f = (soft_cap(gate(x), args.gate_soft_cap) for gate in (self.igate_preact, self.fgate_preact))
        i, f = (gate.astype(mx.float32).swapaxes(1, 2) for gate in (i, f))
        if mask is not None:
            i, f = mx.where(mask[:, None], i, -mx.inf), mx.where(mask[:, None], f, mx.inf)
        split = (*x.shape[:2], args.num_heads, -1)
        q, k, v = (array.reshape(split).swapaxes(1, 2).astype(mx.float32) for array in (q, k, v))
        return Chunk(q, k, v, i, f), o

    @staticmethod
    def _state(tokens: Chunk, cache: Any) -> State:
        if cache is not None and cache[0] is not None:
            return State(cache[0], cache[1], cache[2])
        *rows, _, keys = tokens.k.shape
        return State(mx.zeros((*rows, keys, tokens.v.shape[-1])), mx.zeros((*rows, keys)), mx.zeros((*rows, 1)))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        if args.fused:
            self.proj_up_gate_z = nn.Linear(args.hidden_size, 2 * args.feed, bias=args.use_bias)
        else:
            self.proj_up_gate = nn.Linear(args.hidden_size, args.feed, bias=args.use_bias)
            self.proj_up = nn.Linear(args.hidden_size, args.feed, bias=args.use_bias)
        self.proj_down = nn.Linear(args.feed, args.hidden_size, bias=args.use_bias)

    def __call__(self, x: mx.array) -> mx.array:
        if "proj_up_gate_z" in self:
            gate, up = mx.split(self.proj_up_gate_z(x), 2, axis=-1)
        else:
            gate, up = self.proj_up_gate(x), self.proj_up(x)
        return self.proj_down(nn.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm_mlstm = Norm(args.hidden_size, args.norm_eps, args.use_bias)
        self.mlstm_layer = MLSTM(args)
        self.norm_ffn = Norm(args.hidden_size, args.norm_eps, args.use_bias)
        self.ffn = FeedForward(args)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        x = x + self.mlstm_layer(self.norm_mlstm(x), cache)
        return x + self.ffn(self.norm_ffn(x))


class XLSTM(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.blocks = [Block(args) for _ in range(args.num_hidden_layers)]
        self.out_norm = Norm(args.hidden_size, args.norm_eps, bias=False)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.embeddings(tokens)
        for block, own in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x = block(x, own)
        return self.out_norm(x)


class Model(nn.Module):
    """tokens int32 [B, N] → logits [B, N, vocabulary]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.backbone = XLSTM(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        logits = self.lm_head(self.backbone(tokens, cache))
        # Capped in float32 as in transformers: near the cap half precisions have few numbers.
        return soft_cap(logits.astype(mx.float32), self.args.output_logit_soft_cap).astype(logits.dtype)

    @property
    def layers(self) -> list[Block]:
        return self.backbone.blocks

    def make_cache(self) -> list[ArraysCache]:
        return [ArraysCache(3) for _ in self.layers]
