"""Products of tokens with the matrices of the experts that they chose.

mlx-lm sorts many choices by expert, and asks MLX for a product that knows it. On CUDA that one (mlx 0.32.4) is wrong in
1 to 2 % of the forwards of a small model, by as much as its values are, for most of the choices of the call
(docs/figures.md). Sorted choices are multiplied here in blocks of one expert each, which is the unsorted product of
more than one row; that has not been wrong. Packed experts are asked for unsorted too, whose product does not use it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from adapters.kernels.text import own_device

FEW = 8
"""Choices an expert gets on average, below which each is multiplied separately."""
BLOCKS = (16, 32, 64)
"""Rows of a block. CUDA's product cannot be launched for many (103 were seen to fail)."""


def expert_product(x: mx.array, stack: mx.array, experts: mx.array, *, in_order: bool) -> mx.array:
    """x [choices, 1, in] times stack[experts[i]] [in, out] for choice i → [choices, 1, out]; without `in_order`, what
    `mx.gather_mm` takes. `experts` are uint32 [choices], and ascend where `in_order`."""
    if not in_order or own_device() != "cuda":
        return mx.gather_mm(x, stack, rhs_indices=experts, sorted_indices=in_order)
    each = experts.size / stack.shape[0]
    if each < FEW:
        return mx.gather_mm(x, stack, rhs_indices=experts)
    return in_blocks(x, stack, experts, next((rows for rows in BLOCKS if each < 2 * rows), BLOCKS[-1]))


def in_blocks(x: mx.array, stack: mx.array, experts: mx.array, rows: int) -> mx.array:
    """`expert_product` of choices in order: each expert's own are laid out in blocks of `rows`, the last of which zeros
    fill up. There are as many blocks as there could be, so that shapes do not depend on the choices."""
    count, number = experts.size, stack.shape[0]
    of_each = (experts[:, None] == mx.arange(number, dtype=experts.dtype)).sum(axis=0)
    blocks_of_each = (of_each + (rows - 1)) // rows
    blocks_up_to = mx.cumsum(blocks_of_each)
    moved = (blocks_up_to - blocks_of_each) * rows - (mx.cumsum(of_each) - of_each)
    place = mx.arange(count, dtype=mx.int32) + moved[experts]
    blocks = min(count, count // rows + number)
    laid_out = mx.zeros((blocks * rows, x.shape[-1]), x.dtype)
    laid_out[place] = x.reshape(count, -1)
    passed = (mx.arange(blocks, dtype=mx.int32)[:, None] >= blocks_up_to).sum(axis=1)
    # Blocks that nobody needs are some expert's.
    expert = mx.minimum(passed, number - 1).astype(mx.uint32)
    found = mx.gather_mm(laid_out.reshape(blocks, rows, -1), stack, rhs_indices=expert)
    return found.reshape(blocks * rows, -1)[place][:, None]


class PackedExpertLinear(QuantizedSwitchLinear):
    """mlx-lm's layer of quantised stacked experts, which asks CUDA for no sorted product."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        found: mx.array = super().__call__(x, indices, sorted_indices=sorted_indices and own_device() != "cuda")
        return found


class ExpertLinear(SwitchLinear):
    """mlx-lm's layer of stacked experts with this product."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = expert_product(x, self["weight"].swapaxes(-1, -2), indices, in_order=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


def use_expert_product(module: nn.Module) -> None:
    """Makes mlx-lm's layers of stacked experts these, in place."""
    for _, layer in module.named_modules():
        if type(layer) is SwitchLinear:
            layer.__class__ = ExpertLinear
        elif type(layer) is QuantizedSwitchLinear:
            layer.__class__ = PackedExpertLinear
