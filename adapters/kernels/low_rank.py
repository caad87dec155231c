"""What kernels for adapters in decode steps have in common: one launch adds the low-rank products of each row's version
to what linear layers gave, for one token a row.

On a GPU the two thin products and their sum cost a decode step more in launches than in reading or computing, and
layers that read the same input share one: of a layer's attention and MLP there are four in the place of twenty-one. On
an H200 a step of 256 rows pays some 10 µs on the host for each, which is why the product with A, which every block of
outputs computes again, is not a launch of its own. Every row says which slot it uses, so that one version, many and the
base are the same launch; what a row gets does not depend on the others, nor on which layers share the launch.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from adapters.kernels.text import CONSTANT, Compiler, Device, Launch

MOST_RANK = 128
"""The inner products of a block's rows lie in shared memory, which is laid out when a kernel is compiled."""
NEXT_LAYER = string.Template("""
  if (layer == $before && block >= BLOCKS_OF(outs)) {
    block -= BLOCKS_OF(outs);
    layer = $this;
    y = y$this;
    a = a$this;
    b = b$this;
    out = out$this;
    $optional
    outs = y${this}_shape[2], rank = a${this}_shape[1], stride = b${this}_shape[2];
  }
""")
"""Which of the layers the outputs of this block belong to."""
SCALE = """
      value *= float(gain[(size_t)slots[r] * outs + column]);
"""
BIAS = """
      value += float(bias[column]);
"""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What one layer brings to a launch: gain[slot] · (y + (x · A[slot]) · B[slot]) + bias is asked for."""

    y: mx.array
    """[rows, …, out], what the layer gave without its version."""
    a: mx.array
    """[slots, rank, in]"""
    b: mx.array
    """[slots, rank, at least out]"""
    gain: mx.array | None = None
    """[slots, out]"""
    bias: mx.array | None = None
    """[out]; only where there is a gain."""

    @property
    def optional(self) -> dict[str, mx.array]:
        return {name: array for name in ("gain", "bias") if (array := getattr(self, name)) is not None}


class LowRankKernel(ABC):
    """Compiled when it is first needed, once for layers of every shape."""

    name: str
    """What the log calls it."""

    def __init__(self, device: Device, compiler: Compiler, threads: int) -> None:
        """`threads` are those of a block."""
        self.device, self.compiler, self.threads = device, compiler, threads
        self._kernels: dict[tuple[int, int, str, tuple[str, ...]], Launch] = {}

    @abstractmethod
    def blocks(self, rows: int, widths: Sequence[int]) -> tuple[int, int]:
        """Blocks of a launch for layers of so many outputs: (of outputs, of rows)."""

    @abstractmethod
    def tile(self, ranks: Sequence[int]) -> int:
        """Ranks that a launch for layers of these reads at once."""

    @abstractmethod
    def text(self, layers: int, tile: int, dtype: str, scale: str) -> tuple[str, str]:
        """(Body, header) of a launch; the body has `$optional` and `$chosen` where layers are told apart."""

    def takes(self, x: mx.array, shape: tuple[int, int], rank: int, dtype: mx.Dtype) -> bool:
        """Returns whether it is written for x [rows, …, in] of a layer's (outputs, inputs): one token a row, in the
        dtype of the stack."""
        width = shape[1]
        one_token = x.size == x.shape[0] * width
        whole = width % numbers_at_once(dtype) == 0 and rank % 8 == 0 and 0 < rank <= MOST_RANK
        # No vector is read from an array in Metal's constant space.
        whole = whole and x.size >= CONSTANT
        return one_token and whole and x.dtype == dtype and dtype in (mx.float32, mx.bfloat16, mx.float16)

    def takes_together(self, layers: Sequence[LowRank]) -> bool:
        """Returns whether one launch may compute them: they bring the same arrays, of the same dtypes, and none that
        Metal would keep in another address space than the others'."""
        kinds = {tuple((name, array.dtype) for name, array in layer.optional.items()) for layer in layers}
        arrays = [array for layer in layers for array in (layer.y, *layer.optional.values())]
        return len(kinds) == 1 and all(array.size >= CONSTANT for array in arrays)

    def __call__(self, x: mx.array, rows: mx.array, layers: Sequence[LowRank]) -> list[mx.array]:
        """What each of the layers asks for, for x [rows, …, in], in float32 and rounded once. `rows` uint32, a slot for
        each row or one for all; slot 0 adds nothing."""
        count, dtype = x.shape[0], layers[0].y.dtype
        tile = self.tile([layer.a.shape[1] for layer in layers])
        kind = (len(layers), tile, str(dtype).removeprefix("mlx.core."), tuple(layers[0].optional))
        if kind not in self._kernels:
            self._kernels[kind] = self._make(*kind)
        widths = [layer.y.shape[-1] for layer in layers]
        arrays = [[_by_row(layer.y), layer.a, layer.b, *layer.optional.values()] for layer in layers]
        across, down = self.blocks(count, widths)
        outputs = self._kernels[kind](
            inputs=[_by_row(x), rows, *(array for several in arrays for array in several)],
            template=[("T", dtype)],
            grid=(across * self.threads, down, 1),
            threadgroup=(self.threads, 1, 1),
            output_shapes=[(count, 1, out) for out in widths],
            output_dtypes=[dtype] * len(layers),
        )
        if x.ndim == 3:
            return [*outputs]
        return [output.reshape(layer.y.shape) for output, layer in zip(outputs, layers, strict=True)]

    def _make(self, layers: int, tile: int, dtype: str, optional: tuple[str, ...]) -> Launch:
        def of_layer(layer: int, kind: str = "") -> str:
            return " ".join(f"{kind}{name} = {name}{layer};" for name in optional)

        chosen = [NEXT_LAYER.substitute(before=at - 1, this=at, optional=of_layer(at)) for at in range(1, layers)]
        body, header = self.text(layers, tile, dtype, SCALE * ("gain" in optional) + BIAS * ("bias" in optional))
        names = ("y", "a", "b", *optional)
        return self.compiler(
            self.device,
            f"low_rank_{layers}_{dtype}",
            ["x", "rows", *(f"{name}{layer}" for layer in range(layers) for name in names)],
            [f"out{layer}" for layer in range(layers)],
            string.Template(body).safe_substitute(optional=of_layer(0, "auto "), chosen="".join(chosen)),
            header,
        )


def numbers_at_once(dtype: mx.Dtype) -> int:
    """Numbers in 16 bytes, which one lane reads at once."""
    return 16 // dtype.size


def _by_row(array: mx.array) -> mx.array:
    """[rows, 1, numbers], which it mostly is already: the host would pay for a reshape in every step."""
    return array if array.ndim == 3 else array.reshape(array.shape[0], 1, -1)
