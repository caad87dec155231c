"""The low-rank products of adapters in a decode step by the matrix units of a GPU for CUDA, in half precision.

A block has 16 rows, of which one instruction multiplies 16 inputs by 8 ranks, so that A is read once for all of them
where warps of threads alone read it once for two. Behind the slots, reads of x, A and B are asked for several at a
time, before the first of them is waited for, and what the layer gave before all of them: such a launch mostly waits.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from adapters.kernels.low_rank import MOST_RANK, LowRankKernel
from adapters.kernels.text import INDICES, Compiler, Device, compile_kernel, constants, macros

ROWS = 16
"""Rows of a block: those of one instruction."""
COLUMNS = 128
"""Outputs that a block computes at a time, two for each thread of half of them."""
RANKS = 16
"""Ranks that are read at once, of two instructions."""
INSTRUCTION = string.Template("""
#define MULTIPLY(sums, a0, a1, a2, a3, b0, b1) \\
  asm volatile( \\
      "mma.sync.aligned.m16n8k16.row.col.f32.$kind.$kind.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \\
      "{%0, %1, %2, %3};" \\
      : "+f"((sums)[0]), "+f"((sums)[1]), "+f"((sums)[2]), "+f"((sums)[3]) \\
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
#define READ(into, from) \\
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" \\
               : "=r"((into).x), "=r"((into).y), "=r"((into).z), "=r"((into).w) : "l"(from))
#define READ_RANKS(into, from, left) \\
  for (int half = 0; half < RANKS; half += 8) { \\
    for (int j = 0; j < 8; ++j) (into)[half + j] = 0u; \\
    if (half >= (left)) continue; \\
    for (int j = 0; j < 8; ++j) (into)[half + j] = *(const unsigned int*)((from) + (size_t)(half + j) * stride); \\
  }
#define BLOCKS_OF(outs) ((((outs) + COLUMNS - 1) / COLUMNS + each - 1) / each)
FN void two_of(unsigned int word, LOCAL float* two) {
  $two
}
""")
"""The lane in `group` g and `quarter` q of 32 has two numbers each of rows g and g + 8 of the left side and of
column g of the right one, and sums 2 q and 2 q + 1 of both rows (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Which
of the inputs they are numbers of is free, as long as it is the same on both sides. Reads are volatile, or the compiler
would put some of them behind the first products, which wait for the others."""
TWO = {
    "bfloat16": "two[0] = BITS_TO_FLOAT(word << 16), two[1] = BITS_TO_FLOAT(word & 0xffff0000u);",
    "float16": "two[0] = HALF_TO_FLOAT(word & 0xffffu), two[1] = HALF_TO_FLOAT(word >> 16);",
}
BODY = string.Template(
    """
  struct alignas(4) Pair { T left, right; };
  const int tid = $thread, lane = tid % 32, warp = tid / 32, group = lane / 4, quarter = lane % 4;
  const int count = x_shape[0], width = x_shape[2];
  const int first = $block_y * ROWS;
  // Sets of columns that a block computes, so that there are about as many blocks as a GPU has at a time.
  const int sets = $sets, tiles = (count + ROWS - 1) / ROWS;
  const int each = sets * tiles > BLOCKS ? sets * tiles / BLOCKS : 1;
  int block = $block_x, layer = 0;
  auto y = y0;
  auto a = a0;
  auto b = b0;
  auto out = out0;
  $optional
  int outs = y0_shape[2], rank = a0_shape[1], stride = b0_shape[2];
  $chosen
  // Ranks are read 16 at a time. Where a layer has eight less, those of A are read twice, and nothing of B is added.
  SHARED int slot_of[ROWS];
  SHARED float parts[WARPS][ROWS][RANKS + 4];
  SHARED float inner[MOST_RANK][ROWS];

  // Rows behind the last are computed as that one, and written nowhere.
  const bool one = rows_shape[0] == 1;
  if (tid < ROWS) slot_of[tid] = int(rows[one ? 0 : first + tid < count ? first + tid : count - 1]);
  // In the second half a thread has two columns of these rows.
  const int own = tid / (COLUMNS / 2) * OWN, pair = tid % (COLUMNS / 2) * 2;
  const int begin = block * each, sets_here = (outs + COLUMNS - 1) / COLUMNS;
  const int end = begin + each < sets_here ? begin + each : sets_here;
  unsigned int given[OWN], next_given[OWN], by[RANKS], next_by[RANKS];
  if (begin * COLUMNS + pair < outs) {
    #pragma unroll
    for (int r = 0; r < OWN; ++r) {
      const int row = first + own + r < count ? first + own + r : count - 1;
      next_given[r] = *(const unsigned int*)(y + (size_t)row * outs + begin * COLUMNS + pair);
    }
  }
  BARRIER();
  int slots[OWN];
  bool alike = true;
  #pragma unroll
  for (int r = 0; r < OWN; ++r) {
    slots[r] = slot_of[own + r];
    alike = alike && slots[r] == slots[0];
  }
  const bool shares = alike && slots[0] != 0;
  if (shares && begin * COLUMNS + pair < outs) {
    const T* up = b + (size_t)slots[0] * rank * stride + begin * COLUMNS + pair;
    READ_RANKS(next_by, up, rank);
  }
  // Rows that have a version.
  unsigned int every = 0;
  #pragma unroll
  for (int r = 0; r < ROWS; ++r) every |= (slot_of[r] != 0 ? 1u : 0u) << r;
  const T* upper = x + (size_t)(first + group < count ? first + group : count - 1) * width;
  const T* lower = x + (size_t)(first + group + 8 < count ? first + group + 8 : count - 1) * width;
  #pragma unroll 1
  for (int at = 0; at < rank; at += RANKS) {
    #pragma unroll 1
    for (unsigned int left = every; left != 0;) {
      const int version = slot_of[__ffs(int(left)) - 1];
      unsigned int its_rows = 0;
      #pragma unroll
      for (int r = 0; r < ROWS; ++r) its_rows |= (slot_of[r] == version ? 1u : 0u) << r;
      left &= ~its_rows;
      const T* down = a + ((size_t)version * rank + at + group) * width;
      float sums[RANKS / 8][4];
      #pragma unroll
      for (int n = 0; n < RANKS / 8; ++n) {
        #pragma unroll
        for (int j = 0; j < 4; ++j) sums[n][j] = 0.0f;
      }
      #pragma unroll 1
      for (int start = warp * 32 + quarter * 8; start - quarter * 8 < width; start += WARPS * 32 * STEPS) {
        uint4 high[STEPS], low[STEPS], of[STEPS][RANKS / 8];
        #pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          const int k = start + step * WARPS * 32 < width ? start + step * WARPS * 32 : 0;
          READ(high[step], upper + k);
          READ(low[step], lower + k);
          #pragma unroll
          for (int n = 0; n < RANKS / 8; ++n) {
            READ(of[step][n], down + (size_t)(at + n * 8 < rank ? n * 8 : 0) * width + k);
          }
        }
        #pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          // Behind the last input nothing is added: a version's numbers are finite.
          if (start + step * WARPS * 32 >= width) high[step] = low[step] = uint4{0u, 0u, 0u, 0u};
          #pragma unroll
          for (int n = 0; n < RANKS / 8; ++n) {
            const uint4 here = of[step][n];
            MULTIPLY(sums[n], high[step].x, low[step].x, high[step].y, low[step].y, here.x, here.y);
            MULTIPLY(sums[n], high[step].z, low[step].z, high[step].w, low[step].w, here.z, here.w);
          }
        }
      }
      #pragma unroll
      for (int n = 0; n < RANKS / 8; ++n) {
        #pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = group + j / 2 * 8;
          if (its_rows >> row & 1u) parts[warp][row][n * 8 + quarter * 2 + j % 2] = sums[n][j];
        }
      }
    }
    BARRIER();
    #pragma unroll
    for (int part = 0; part < (ROWS * RANKS + 32 * WARPS - 1) / (32 * WARPS); ++part) {
      const int row = (part * 32 * WARPS + tid) % ROWS, of = (part * 32 * WARPS + tid) / ROWS;
      if (of < RANKS) {
        float whole = 0.0f;
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) whole += parts[w][row][of];
        inner[at + of][row] = whole;
      }
    }
    BARRIER();
  }
  #pragma unroll 1
  for (int set = begin; set < end; ++set) {
    const int left = set * COLUMNS + pair;
    // Two columns are both there or both not: every layer has an even number of them.
    if (left >= outs) break;
    const bool more = set + 1 < end && left + COLUMNS < outs;
    #pragma unroll
    for (int r = 0; r < OWN; ++r) {
      given[r] = next_given[r];
      const int row = first + own + r < count ? first + own + r : count - 1;
      if (more) next_given[r] = *(const unsigned int*)(y + (size_t)row * outs + left + COLUMNS);
    }
    float added[OWN][2];
    #pragma unroll
    for (int r = 0; r < OWN; ++r) added[r][0] = added[r][1] = 0.0f;
    if (shares) {
      const T* up = b + (size_t)slots[0] * rank * stride + left;
      #pragma unroll 1
      for (int at = 0; at < rank; at += RANKS) {
        #pragma unroll
        for (int j = 0; j < RANKS; ++j) by[j] = next_by[j];
        const bool last = at + RANKS >= rank;
        if (!last || more) {
          const int next = last ? 0 : at + RANKS;
          const T* then = (last ? up + COLUMNS : up) + (size_t)next * stride;
          READ_RANKS(next_by, then, rank - next);
        }
        #pragma unroll
        for (int j = 0; j < RANKS; ++j) {
          float two[2];
          two_of(by[j], two);
          #pragma unroll
          for (int r = 0; r < OWN; ++r) {
            added[r][0] += inner[at + j][own + r] * two[0];
            added[r][1] += inner[at + j][own + r] * two[1];
          }
        }
      }
    } else {
      #pragma unroll 1
      for (int r = 0; r < OWN; ++r) {
        const int slot = slot_of[own + r];
        const T* up = b + (size_t)slot * rank * stride + left;
        float sum[2] = {0.0f, 0.0f};
        #pragma unroll 1
        for (int at = 0; at < (slot == 0 ? 0 : rank); at += RANKS) {
          const T* from = up + (size_t)at * stride;
          READ_RANKS(by, from, rank - at);
          #pragma unroll
          for (int j = 0; j < RANKS; ++j) {
            float two[2];
            two_of(by[j], two);
            sum[0] += inner[at + j][own + r] * two[0];
            sum[1] += inner[at + j][own + r] * two[1];
          }
        }
        #pragma unroll
        for (int other = 0; other < OWN; ++other) {
          if (other == r) added[other][0] = sum[0], added[other][1] = sum[1];
        }
      }
    }
    #pragma unroll
    for (int r = 0; r < OWN; ++r) {
      if (first + own + r >= count) continue;
      float two[2], both[2];
      two_of(given[r], two);
      #pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = left + half;
        float value = two[half] + added[r][half];
        $scale
        both[half] = value;
      }
      *(Pair*)(out + (size_t)(first + own + r) * outs + left) = Pair{T(both[0]), T(both[1])};
    }
  }
"""
)


@dataclass(frozen=True, slots=True)
class Share:
    """How a launch is shared out."""

    warps: int = 8
    """Those of a block, 2, 4, 8 or 16, share the inputs of its rows."""
    blocks: int = 256
    """Blocks that a launch has about, where it has that many: two for each multiprocessor of an H200."""
    steps: int = 2
    """Reads of each thread along the inputs that are asked for before the first is waited for."""


class MatrixKernel(LowRankKernel):
    """For layers of an even number of outputs, in bfloat16 or float16."""

    name = "matrix units"

    def __init__(self, device: Device, compiler: Compiler = compile_kernel, share: Share = Share()) -> None:
        super().__init__(device, compiler, 32 * share.warps)
        self.share = share

    def takes(self, x: mx.array, shape: tuple[int, int], rank: int, dtype: mx.Dtype) -> bool:
        return super().takes(x, shape, rank, dtype) and shape[0] % 2 == 0 and dtype in (mx.bfloat16, mx.float16)

    def blocks(self, rows: int, widths: Sequence[int]) -> tuple[int, int]:
        tiles, sets = -(-rows // ROWS), [-(-out // COLUMNS) for out in widths]
        each = max(sum(sets) * tiles // self.share.blocks, 1)
        return sum(-(-count // each) for count in sets), tiles

    def tile(self, ranks: Sequence[int]) -> int:
        return RANKS

    def text(self, layers: int, tile: int, dtype: str, scale: str) -> tuple[str, str]:
        share = self.share
        given = constants(
            WARPS=share.warps, BLOCKS=share.blocks, STEPS=share.steps, OWN=ROWS * COLUMNS // 64 // share.warps,
            ROWS=ROWS, COLUMNS=COLUMNS, RANKS=tile, MOST_RANK=MOST_RANK,
        )  # fmt: skip
        sets = " + ".join(f"(y{layer}_shape[2] + COLUMNS - 1) / COLUMNS" for layer in range(layers))
        body = BODY.safe_substitute(INDICES[self.device], scale=scale, sets=sets)
        instruction = INSTRUCTION.substitute(kind={"bfloat16": "bf16", "float16": "f16"}[dtype], two=TWO[dtype])
        return given + body, macros(self.device) + instruction
