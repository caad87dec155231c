"""RecurrentGemma (Griffin, arXiv:2402.19427): blocks of a gated linear recurrence or of attention over a window, as
transformers' `recurrent_gemma` computes them; parameters have its names.

mlx-lm has the family too. Its blocks take another eps than config.json says, it does not round the factor of the
embeddings as transformers does, it keeps the recurrence in half precision, and its model cannot be frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

FORGET = -8.0
"""What the recurrent gate is multiplied by: `c` of the paper."""
ATTENTION = "attention"


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    attention_window_size: int
    conv1d_width: int = 4
    lru_width: int | None = None
    """`hidden_size` if it is not said."""
    logits_soft_cap: float = 30.0
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    attention_bias: bool = False
    head_dim: int | None = None
    """`hidden_size` over the heads if it is not said."""
    block_types: list[str] | None = None
    _block_types: list[str] | None = None
    """What the first published files call it."""

    @property
    def kinds(self) -> list[str]:
        """Layers have the named kinds in turn."""
        turn = self.block_types or self._block_types or ["recurrent", "recurrent", ATTENTION]
        return [turn[at % len(turn)] for at in range(self.num_hidden_layers)]

    @property
    def size(self) -> int:
        """The width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def width(self) -> int:
        return self.lru_width or self.hidden_size


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((width,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, 1.0 + self.weight, self._eps)


class Convolution(nn.Module):
    """Every channel by itself over the last `size` tokens."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((width, size, 1))
        self.bias = mx.zeros((width,))

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """x [B, N, width] → [B, N, width]. The cache keeps the last inputs of each row."""
        kept = self.weight.shape[1] - 1
        before = cache[0] if cache is not None else None
        if before is None:
            before = mx.zeros((x.shape[0], kept, x.shape[-1]), x.dtype)
        whole = mx.concatenate([before, x], axis=1)
        if cache is not None:
            ends = None if cache.lengths is None else mx.clip(cache.lengths, 0, x.shape[1])
            cache[0] = mx.contiguous(whole[:, -kept:]) if ends is None else _behind(whole, ends, kept)
        return mx.conv_general(whole, self.weight, groups=x.shape[-1]) + self.bias


def _behind(whole: mx.array, ends: mx.array, kept: int) -> mx.array:
    """The `kept` inputs before the end of each row, [B, kept, width]; `whole` begins so many before the first token."""
    positions = ends[:, None] + mx.arange(kept)
    return mx.take_along_axis(whole, positions[..., None], axis=1)


class Recurrence(nn.Module):
    """The real-gated linear recurrent unit, in float32 from its gates on, as transformers keeps its state."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        size = width // heads
        self.recurrent_param = mx.zeros((width,))
        self.input_gate_weight = mx.zeros((heads, size, size))
        self.input_gate_bias = mx.zeros((heads, size))
        self.recurrent_gate_weight = mx.zeros((heads, size, size))
        self.recurrent_gate_bias = mx.zeros((heads, size))

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        """x [B, N, width] → [B, N, width]. The cache holds the state and, [B, 1], whether it has read anything;
        positions beyond a row's length leave both as they are."""
        log_a = FORGET * self._gate("recurrent", x) * nn.softplus(self.recurrent_param)
        a = mx.exp(log_a.astype(mx.float32))
        multiplier = mx.sqrt(1.0 - mx.exp(2.0 * log_a.astype(mx.float32)))
        state, begun = (cache[1], cache[2]) if cache is not None else (None, None)
        if state is None or begun is None:
            state, begun = mx.zeros((x.shape[0], x.shape[-1])), mx.zeros((x.shape[0], 1), mx.bool_)
        # The first token of a sequence comes in whole.
        multiplier[:, 0] = mx.where(begun, multiplier[:, 0], 1.0)
        given = (x * self._gate("input", x) * multiplier.astype(x.dtype)).astype(mx.float32)
        mask = cache.make_mask(x.shape[1]) if cache is not None else None
        outputs = []
        for at in range(x.shape[1]):
            after = a[:, at] * state + given[:, at]
            state = after if mask is None else mx.where(mask[:, at, None], after, state)
            outputs.append(state)
        if cache is not None:
            cache[1], cache[2] = state, mx.ones_like(begun) if mask is None else begun | mask[:, :1]
        return mx.stack(outputs, axis=1).astype(x.dtype)

    def _gate(self, name: str, x: mx.array) -> mx.array:
        heads, size, _ = self[f"{name}_gate_weight"].shape
        parts = x.reshape(*x.shape[:2], heads, size).swapaxes(1, 2) @ self[f"{name}_gate_weight"]
        return mx.sigmoid((parts.swapaxes(1, 2) + self[f"{name}_gate_bias"]).reshape(x.shape))


class RecurrentBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.linear_y = nn.Linear(args.hidden_size, args.width)
        self.linear_x = nn.Linear(args.hidden_size, args.width)
        self.linear_out = nn.Linear(args.width, args.hidden_size)
        self.conv_1d = Convolution(args.width, args.conv1d_width)
        self.rg_lru = Recurrence(args.width, args.num_attention_heads)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        found = self.rg_lru(self.conv_1d(self.linear_x(x), cache), cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.linear_out(found * nn.gelu_approx(self.linear_y(x)))


class AttentionBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        heads, keys, size = args.num_attention_heads, args.num_key_value_heads, args.size
        self.q_proj = nn.Linear(args.hidden_size, heads * size, bias=args.attention_bias)
        self.k_proj = nn.Linear(args.hidden_size, keys * size, bias=args.attention_bias)
        self.v_proj = nn.Linear(args.hidden_size, keys * size, bias=args.attention_bias)
        self.o_proj = nn.Linear(heads * size, args.hidden_size, bias=True)
        self.rope = nn.RoPE(int(size * args.partial_rotary_factor), traditional=False, base=args.rope_theta)
        self._size = size

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        batch, length, _ = x.shape
        queries, keys, values = (
            layer(x).reshape(batch, length, -1, self._size).transpose(0, 2, 1, 3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        found = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self._size**-0.5, mask=mask)
        return self.o_proj(found.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width = args.intermediate_size // 2
        self.gate_proj = nn.Linear(args.hidden_size, width)
        self.up_proj = nn.Linear(args.hidden_size, width)
        self.down_proj = nn.Linear(width, args.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__()
        self.attends = kind == ATTENTION
        self.temporal_pre_norm = Norm(args.hidden_size, args.rms_norm_eps)
        self.temporal_block = AttentionBlock(args) if self.attends else RecurrentBlock(args)
        self.channel_pre_norm = Norm(args.hidden_size, args.rms_norm_eps)
        self.mlp_block = FeedForward(args)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.temporal_block(self.temporal_pre_norm(x), mask, cache)
        return x + self.mlp_block(self.channel_pre_norm(x))


class Griffin(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, kind) for kind in args.kinds]
        self.final_norm = Norm(args.hidden_size, args.rms_norm_eps)
        self._window = args.attention_window_size
        # Rounded whatever the model's precision is.
        self._factor = mx.array(args.hidden_size**0.5, mx.bfloat16).item()

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.embed_tokens(tokens) * self._factor
        caches = cache or [None] * len(self.layers)
        attending = [own for layer, own in zip(self.layers, caches, strict=True) if layer.attends]
        mask = create_attention_mask(x, attending[0], window_size=self._window) if attending else None
        for layer, own in zip(self.layers, caches, strict=True):
            x = layer(x, mask, own)
        return self.final_norm(x)


class Model(nn.Module):
    """tokens int32 [B, N] → logits [B, N, vocabulary]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Griffin(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        x, cap = self.model(tokens, cache), self.args.logits_soft_cap
        logits = self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)
        return mx.tanh(logits / cap) * cap if cap else logits

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        return [RotatingKVCache(self.args.attention_window_size) if b.attends else ArraysCache(3) for b in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        if "lm_head.weight" not in weights:
            self.pop("lm_head")
        return {
            # torch has the channels before the tokens.
            name: value.moveaxis(2, 1) if name.endswith("conv_1d.weight") and value.shape[-1] != 1 else value
            for name, value in weights.items()
        }
