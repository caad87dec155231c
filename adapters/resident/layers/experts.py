"""A block of stacked experts that adds, row by row and expert by expert, the low-rank product of the row's version.

The block is wrapped, not the layers in it: it sorts its tokens by expert before they see them, and by then nobody knows
which row a token is of.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from adapters.resident.layers.slot_stack import SlotStack

EXPERT_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    SwitchGLU: ("up_proj", "gate_proj", "down_proj"),
    SwitchMLP: ("fc1", "fc2"),
}
SORTED_FROM = 64
"""Choices, from which on mlx-lm's blocks sort them by expert."""


class AdaptedExperts(nn.Module):
    """What mlx-lm's SwitchGLU or SwitchMLP computes, each layer with (x · A[slot, expert]) · B[slot, expert] added; the
    block itself where no slot is aimed at. For x [batch, …, in] and indices [batch, …, choices], or both with rows and
    tokens flattened into one."""

    def __init__(self, base: SwitchGLU | SwitchMLP) -> None:
        super().__init__()
        self.base = base
        # A tuple, since a dictionary or list would become children of this module.
        self._stacks: tuple[tuple[str, SlotStack], ...] = ()
        if not base.training:
            self.eval()

    def attach(self, stack: SlotStack, layer: str) -> None:
        self._stacks = (*self._stacks, (layer, stack))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        base = self["base"]
        stacks = {name: stack for name, stack in self._stacks if stack.aimed}
        if not stacks:
            return base(x, indices)
        x = mx.expand_dims(x, (-2, -3))
        stacked = _stacked(indices, stacks)
        chosen, back, in_order = indices, None, indices.size >= SORTED_FROM
        if in_order:
            chosen = indices.flatten()
            order = mx.argsort(chosen)
            back = mx.argsort(order)
            x, chosen, stacked = x.flatten(0, -3)[order // indices.shape[-1]], chosen[order], stacked.flatten()[order]

        def layer(name: str, x: mx.array) -> mx.array:
            y = base[name](x, chosen, sorted_indices=in_order)
            if name in stacks:
                y = y + stacks[name].of_experts(x, chosen, stacked, in_order=in_order)
            return y

        if isinstance(base, SwitchGLU):
            y = layer("down_proj", base.activation(layer("up_proj", x), layer("gate_proj", x)))
        else:
            y = layer("fc2", base.activation(layer("fc1", x)))
        if back is not None:
            y = mx.unflatten(y[back], 0, indices.shape)
        return y.squeeze(-2)


def _stacked(indices: mx.array, stacks: dict[str, SlotStack]) -> mx.array:
    """slot × experts + expert of every choice, shaped as `indices`; the expert if all rows use one slot."""
    routed = next((stack for stack in stacks.values() if stack.rows is not None), None)
    if routed is None or routed.rows is None:
        return indices
    rows = routed.rows
    if indices.shape[0] % rows.size or (indices.ndim > 2 and indices.shape[0] != rows.size):
        raise ValueError(
            f"The batch has {rows.size} rows, but a block of experts got choices of shape {indices.shape}."
        )
    rows = mx.repeat(rows, indices.shape[0] // rows.size)  # Flattened row by row, in families that do.
    slots = rows.reshape(-1, *(1,) * (indices.ndim - 1))
    return slots * routed.a.shape[1] + indices.astype(mx.uint32)
