"""One launch that adds the low-rank products of each row's version to what linear layers gave, for one token a row.

On a GPU the two thin products and their sum cost a decode step more in launches than in reading or computing, and
layers that read the same input share one: of a layer's attention and MLP there are four in the place of twenty-one. On
an H200 a step of 256 rows pays some 16 µs on the host for each, which is why the product with A, which every block of
outputs computes again, is not a launch of its own. Every row says which slot it uses, so that one version, many and the
base are the same launch; what a row gets does not depend on the others, nor on which layers share the launch.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from adapters.kernels.text import (
    CONSTANT,
    INDICES,
    NUMBERS,
    Compiler,
    Device,
    Launch,
    compile_kernel,
    constants,
    macros,
    own_device,
)

MOST_RANK = 128
"""The inner products of a block's rows lie in shared memory, which is laid out when a kernel is compiled."""
TILES = (16, 8)
"""Ranks that a warp reads at once: the first that divides all of a launch."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a launch is shared out over threads."""

    parts: int = 4
    """Warps that share the inputs of a pair of rows; where both are of one version, A is read once for them."""
    rows: int = 4
    """Rows of a block, an even number."""
    columns: int = 4
    """Outputs of a thread."""

    @property
    def warps(self) -> int:
        return self.parts * self.rows // 2

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return self.columns * 32 * self.warps


BODY = string.Template(
    """
  const int tid = $thread, lane = tid % 32, warp = tid / 32;
  const int count = x_shape[0], width = x_shape[1];
  const int first = $block_y * ROWS;
  const bool one = rows_shape[0] == 1;
  int block = $block_x, layer = 0;
  auto y = y0;
  auto a = a0;
  auto b = b0;
  auto out = out0;
  $optional
  int outs = y0_shape[1], rank = a0_shape[1], stride = b0_shape[2];
  $chosen
  SHARED float inner[PARTS][MOST_RANK][ROWS];

  int slots[ROWS];
  bool alike = true;
  #pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    slots[r] = first + r < count ? int(rows[one ? 0 : first + r]) : 0;
    alike = alike && (first + r >= count || slots[r] == slots[0]);
  }
  {
    const int part = warp % PARTS, left = warp / PARTS * 2, right = left + 1;
    const int slot = first + left < count ? int(rows[one ? 0 : first + left]) : 0;
    const int other = first + right < count ? int(rows[one ? 0 : first + right]) : 0;
    const DEVICE T* mine = x + (size_t)(first + left < count ? first + left : first) * width;
    const DEVICE T* theirs = x + (size_t)(first + right < count ? first + right : first) * width;
    // Both rows by the version of the left one; and by that of the right one, where it is another.
    for (int side = 0; side < (slot == other ? 1 : 2); ++side) {
      const int version = side == 0 ? slot : other;
      for (int at = 0; at < (version == 0 ? 0 : rank); at += RANKS) {
        float sums[2 * RANKS];
        #pragma unroll
        for (int j = 0; j < 2 * RANKS; ++j) sums[j] = 0.0f;
        const DEVICE T* by = a + ((size_t)version * rank + at) * width;
        for (int k = (part * 32 + lane) * VEC; k < width; k += 32 * PARTS * VEC) {
          // All are asked for before the first is waited for.
          uint4 down[RANKS];
          #pragma unroll
          for (int j = 0; j < RANKS; ++j) down[j] = *(const DEVICE uint4*)(by + (size_t)j * width + k);
          float one_row[VEC], next_row[VEC], numbers[VEC];
          numbers_of(*(const DEVICE uint4*)(mine + k), one_row);
          numbers_of(*(const DEVICE uint4*)(theirs + k), next_row);
          #pragma unroll
          for (int j = 0; j < RANKS; ++j) {
            numbers_of(down[j], numbers);
            #pragma unroll
            for (int i = 0; i < VEC; ++i) {
              sums[j] += one_row[i] * numbers[i];
              sums[RANKS + j] += next_row[i] * numbers[i];
            }
          }
        }
        // A lane is left with one of the sums: in each step it gives away half of those that it has.
        int found = 0;
        #pragma unroll
        for (int step = 16, kept = RANKS; step > 0; step /= 2, kept /= 2) {
          const bool upper = (lane & step) != 0;
          #pragma unroll
          for (int j = 0; j < RANKS; ++j) {
            if (j < kept) {
              const float own = upper ? sums[j + kept] : sums[j], away = upper ? sums[j] : sums[j + kept];
              sums[j] = own + SHUFFLE(away, step);
            }
          }
          if (kept == 0) sums[0] += SHUFFLE(sums[0], step);
          if (upper) found += kept;
        }
        const int of = found < RANKS ? 0 : 1;
        if (slot == other || of == side) inner[part][at + found % RANKS][of == 0 ? left : right] = sums[0];
      }
    }
  }
  BARRIER();
  for (int at = tid; at < ROWS * rank; at += 32 * WARPS) {
    float whole = 0.0f;
    for (int part = 0; part < PARTS; ++part) whole += inner[part][at / ROWS][at % ROWS];
    inner[0][at / ROWS][at % ROWS] = whole;
  }
  BARRIER();
  // One after another: a text of several would be longer than what a multiprocessor keeps of it.
  #pragma unroll 1
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = block * OUTPUTS + c * 32 * WARPS + tid;
    if (column >= outs) continue;
    float given[ROWS], added[ROWS];
    #pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      given[r] = first + r < count ? float(y[(size_t)(first + r) * outs + column]) : 0.0f;
      added[r] = 0.0f;
    }
    if (alike) {
      const DEVICE T* up = b + (size_t)slots[0] * rank * stride + column;
      for (int at = 0; at < (slots[0] == 0 ? 0 : rank); at += RANKS) {
        float by[RANKS];
        #pragma unroll
        for (int j = 0; j < RANKS; ++j) by[j] = float(up[(size_t)(at + j) * stride]);
        #pragma unroll
        for (int j = 0; j < RANKS; ++j) {
          #pragma unroll
          for (int r = 0; r < ROWS; ++r) added[r] += inner[0][at + j][r] * by[j];
        }
      }
    } else {
      #pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const DEVICE T* up = b + (size_t)slots[r] * rank * stride + column;
        for (int at = 0; at < (slots[r] == 0 ? 0 : rank); at += RANKS) {
          float by[RANKS];
          #pragma unroll
          for (int j = 0; j < RANKS; ++j) by[j] = float(up[(size_t)(at + j) * stride]);
          #pragma unroll
          for (int j = 0; j < RANKS; ++j) added[r] += inner[0][at + j][r] * by[j];
        }
      }
    }
    #pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r >= count) continue;
      float value = given[r] + added[r];
      $scale
      out[(size_t)(first + r) * outs + column] = T(value);
    }
  }
"""
)
NEXT_LAYER = string.Template("""
  if (layer == $before && block >= (outs + OUTPUTS - 1) / OUTPUTS) {
    block -= (outs + OUTPUTS - 1) / OUTPUTS;
    layer = $this;
    y = y$this;
    a = a$this;
    b = b$this;
    out = out$this;
    $optional
    outs = y${this}_shape[1], rank = a${this}_shape[1], stride = b${this}_shape[2];
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


class DecodeKernel:
    """Compiled when it is first needed, once for layers of every shape."""

    def __init__(self, device: Device, compiler: Compiler = compile_kernel, geometry: Geometry = Geometry()) -> None:
        self.device, self.compiler, self.geometry = device, compiler, geometry
        self._kernels: dict[tuple[int, int, str, tuple[str, ...]], Launch] = {}

    def takes(self, x: mx.array, width: int, rank: int, dtype: mx.Dtype) -> bool:
        """Returns whether it is written for x [rows, …, in] of this many inputs: one token a row, in the dtype of the
        stack."""
        one_token = x.size == x.shape[0] * width
        whole = width % _numbers(dtype) == 0 and rank % 8 == 0 and 0 < rank <= MOST_RANK
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
        count, dtype, shared = x.shape[0], layers[0].y.dtype, self.geometry
        tile = next(tile for tile in TILES if all(layer.a.shape[1] % tile == 0 for layer in layers))
        kind = (len(layers), tile, str(dtype).removeprefix("mlx.core."), tuple(layers[0].optional))
        if kind not in self._kernels:
            self._kernels[kind] = self._make(*kind)
        widths = [layer.y.shape[-1] for layer in layers]
        arrays = [[layer.y.reshape(count, -1), layer.a, layer.b, *layer.optional.values()] for layer in layers]
        outputs = self._kernels[kind](
            inputs=[x.reshape(count, -1), rows, *(array for several in arrays for array in several)],
            template=[("T", dtype)],
            grid=(sum(-(-out // shared.outputs) for out in widths) * 32 * shared.warps, -(-count // shared.rows), 1),
            threadgroup=(32 * shared.warps, 1, 1),
            output_shapes=[(count, out) for out in widths],
            output_dtypes=[dtype] * len(layers),
        )
        return [output.reshape(layer.y.shape) for output, layer in zip(outputs, layers, strict=True)]

    def _make(self, layers: int, tile: int, dtype: str, optional: tuple[str, ...]) -> Launch:
        shared = self.geometry

        def of_layer(layer: int, kind: str = "") -> str:
            return " ".join(f"{kind}{name} = {name}{layer};" for name in optional)

        chosen = [NEXT_LAYER.substitute(before=at - 1, this=at, optional=of_layer(at)) for at in range(1, layers)]
        scale = SCALE * ("gain" in optional) + BIAS * ("bias" in optional)
        given = constants(
            PARTS=shared.parts, ROWS=shared.rows, WARPS=shared.warps, COLUMNS=shared.columns, OUTPUTS=shared.outputs,
            RANKS=tile, MOST_RANK=MOST_RANK, VEC=4 if dtype == "float32" else 8,
        )  # fmt: skip
        names = ("y", "a", "b", *optional)
        return self.compiler(
            self.device,
            f"low_rank_{layers}_{dtype}",
            ["x", "rows", *(f"{name}{layer}" for layer in range(layers) for name in names)],
            [f"out{layer}" for layer in range(layers)],
            given
            + BODY.substitute(INDICES[self.device], optional=of_layer(0, "auto "), chosen="".join(chosen), scale=scale),
            macros(self.device) + NUMBERS[dtype],
        )


def _numbers(dtype: mx.Dtype) -> int:
    """Numbers in 16 bytes, which one lane reads at once."""
    return 16 // dtype.size


def decode_kernel() -> DecodeKernel | None:
    """That of the default device; None where there is none, as on a CPU."""
    device = own_device()
    return None if device is None else DecodeKernel(device)
