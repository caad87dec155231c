"""The low-rank products of adapters in a decode step by threads alone, on every GPU and in every dtype."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.kernels.low_rank import MOST_RANK, LowRankKernel
from adapters.kernels.text import INDICES, NUMBERS, Compiler, Device, compile_kernel, constants, macros

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
  const int count = x_shape[0], width = x_shape[2];
  const int first = $block_y * ROWS;
  const bool one = rows_shape[0] == 1;
  int block = $block_x, layer = 0;
  auto y = y0;
  auto a = a0;
  auto b = b0;
  auto out = out0;
  $optional
  int outs = y0_shape[2], rank = a0_shape[1], stride = b0_shape[2];
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
BLOCKS_OF = """
#define BLOCKS_OF(outs) (((outs) + OUTPUTS - 1) / OUTPUTS)
"""


class DecodeKernel(LowRankKernel):
    """A warp multiplies two rows by A, and each thread what comes of it by columns of B."""

    name = "threads"

    def __init__(self, device: Device, compiler: Compiler = compile_kernel, geometry: Geometry = Geometry()) -> None:
        super().__init__(device, compiler, 32 * geometry.warps)
        self.geometry = geometry

    def blocks(self, rows: int, widths: Sequence[int]) -> tuple[int, int]:
        return sum(-(-out // self.geometry.outputs) for out in widths), -(-rows // self.geometry.rows)

    def tile(self, ranks: Sequence[int]) -> int:
        return next(tile for tile in TILES if all(rank % tile == 0 for rank in ranks))

    def text(self, layers: int, tile: int, dtype: str, scale: str) -> tuple[str, str]:
        shared = self.geometry
        given = constants(
            PARTS=shared.parts, ROWS=shared.rows, WARPS=shared.warps, COLUMNS=shared.columns, OUTPUTS=shared.outputs,
            RANKS=tile, MOST_RANK=MOST_RANK, VEC=4 if dtype == "float32" else 8,
        )  # fmt: skip
        body = BODY.safe_substitute(INDICES[self.device], scale=scale)
        return given + body, macros(self.device) + NUMBERS[dtype] + BLOCKS_OF
