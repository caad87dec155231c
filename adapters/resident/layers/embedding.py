"""A token embedding, and the head that may share its weight, with what the version of each row adds to either."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from adapters.resident.layers.slot_stack import SlotStack


class AdaptedEmbedding(nn.Module):
    """An embedding and, where the head shares its weight, that head; each with a stack of its own once it has one,
    so that an adapter may change either or both."""

    def __init__(self, base: nn.Embedding | nn.QuantizedEmbedding) -> None:
        super().__init__()
        self.base = base
        self._table: SlotStack | None = None
        self._head: SlotStack | None = None
        if not base.training:
            self.eval()

    def attach(self, stack: SlotStack, *, head: bool) -> None:
        if head:
            self._head = stack
        else:
            self._table = stack

    def __call__(self, tokens: mx.array) -> mx.array:
        y, stack = self["base"](tokens), self._table
        return y if stack is None or not stack.aimed else stack.scaled(y + stack.entries(tokens))

    def as_linear(self, x: mx.array) -> mx.array:
        y, stack = self["base"].as_linear(x), self._head
        return y if stack is None or not stack.aimed else stack.scaled(y + stack.product(x))
