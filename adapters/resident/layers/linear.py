"""Linear layers that add, row by row, the low-rank product of whichever adapter version each row runs on, and multiply
by its DoRA gain where it has one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from adapters.kernels.low_rank import LowRank
from adapters.resident.layers.slot_stack import SlotStack

SHARE_AN_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("query", "key", "value"),
)
"""Names of layers that blocks give the same input, one after another."""


class SharedInput:
    """Adapted layers of one block that are given the same array: whichever is called first has their products added by
    one launch, for all of them. One is enough, if its block turns out to use it otherwise, for each to go alone."""

    def __init__(self) -> None:
        self._layers: list[AdaptedLinear] = []
        self._x: mx.array | None = None
        self._ready: dict[SlotStack, mx.array] = {}
        self._apart = False

    def add(self, layer: AdaptedLinear) -> None:
        self._layers.append(layer)

    def forget(self) -> None:
        """A forward broke off: nobody comes for what was computed, and the block is no less one that shares."""
        self._x, self._ready = None, {}

    def result(self, layer: AdaptedLinear, x: mx.array) -> mx.array | None:
        """What `layer` gives for x; None where it is to compute that alone."""
        if self._x is not x or layer.stack not in self._ready:
            # Nobody came for what was computed: the layers are given different arrays, or some are not called.
            self._apart = self._apart or bool(self._ready)
            self._ready = {} if self._apart else self._together(layer, x)
        found = self._ready.pop(layer.stack, None)
        self._x = x if self._ready else None
        return found

    def _together(self, layer: AdaptedLinear, x: mx.array) -> dict[SlotStack, mx.array]:
        """What all of them give for x, by their stacks; nothing where they cannot share a launch."""
        kernel, rows = layer.stack.kernel, layer.stack.rows
        layers = [other for other in self._layers if other.takes(x) and other.stack.rows is rows]
        if kernel is None or rows is None or len(layers) < 2:
            return {}
        parts = [other.low_rank(x) for other in layers]
        if any(part.y.dtype != x.dtype for part in parts) or not kernel.takes_together(parts):
            return {}
        return dict(zip((other.stack for other in layers), kernel(x, rows, parts), strict=True))


class AdaptedLinear(nn.Module):
    """y = gain[slot[row]] * (W·x + (x · A[slot[row]]) · B[slot[row]]) + bias for x [batch, …, in]; the base alone where
    no slot is aimed at, and no gain where no row has one. The bias is not scaled, as in PEFT and in mlx-lm.

    The base layer is the only child, so parameters, freezing and modes are those of the base. The result has the
    dtype of the base's result as long as the stack has that of the activations.
    """

    def __init__(self, base: nn.Module, stack: SlotStack, shared: SharedInput | None = None) -> None:
        super().__init__()
        self.base = base
        self.stack = stack
        self._shared = shared
        if shared is not None:
            shared.add(self)
        if not base.training:
            self.eval()

    def __call__(self, x: mx.array) -> mx.array:
        base, stack = self["base"], self.stack
        if not stack.aimed:
            return base(x)
        if self.takes(x):
            found = None if self._shared is None else self._shared.result(self, x)
            return self._alone(x) if found is None else found
        return self._plainly(x, _without_bias(base, x) if stack.scales else base(x))

    def takes(self, x: mx.array) -> bool:
        """Returns whether a kernel adds what the versions do to x."""
        return self.stack.aimed and self.stack.takes(x)

    def low_rank(self, x: mx.array) -> LowRank:
        """What it brings to a launch of the kernel."""
        base = self["base"]
        if not self.stack.scales:
            return self.stack.low_rank(base(x), None)
        return self.stack.low_rank(_without_bias(base, x), base.get("bias"))

    def _alone(self, x: mx.array) -> mx.array:
        part, kernel, rows = self.low_rank(x), self.stack.kernel, self.stack.rows
        if kernel is None or rows is None or part.y.dtype != x.dtype:
            return self._plainly(x, part.y)
        return kernel(x, rows, [part])[0]

    def _plainly(self, x: mx.array, y: mx.array) -> mx.array:
        """With products of their own; `y` is what the base gave, without its bias where there are gains."""
        base, stack = self["base"], self.stack
        y = stack.scaled(y + stack.product(x))
        return y + base["bias"] if stack.scales and "bias" in base else y


class SummedLinear(AdaptedLinear):
    """The same for a layer of which each rank reads some of the inputs: A has those columns alone, what ranks have of
    both products is summed once, and the gain comes after the sum."""

    def __call__(self, x: mx.array) -> mx.array:
        base, stack = self["base"], self.stack
        if not stack.aimed:
            return base(x)
        y = stack.scaled(mx.distributed.all_sum(_product(base, x) + stack.product(x), group=base.group))
        return y + base["bias"] if "bias" in base else y

    def takes(self, x: mx.array) -> bool:
        """A kernel would add what comes before the sum to what comes after it."""
        return False


def _without_bias(layer: Any, x: mx.array) -> mx.array:
    """W · x, the very product that the layer computes."""
    if "bias" not in layer:
        return layer(x)
    return _product(layer, x)


def _product(layer: Any, x: mx.array) -> mx.array:
    """W · x alone, of what this rank has of W."""
    if "scales" not in layer:
        return x @ layer["weight"].T
    return mx.quantized_matmul(
        x,
        layer["weight"],
        scales=layer["scales"],
        biases=layer.get("biases"),
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
