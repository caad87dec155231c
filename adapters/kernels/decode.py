"""One launch that adds the low-rank product of each row's version to what a linear layer gave, for one token a row.

On a GPU the two thin products and their sum cost a decode step more in launches than in reading or computing: 196
layers of rank 16 cost 9.5 ms beside 5.4 for the layers themselves on an H200. Every row says which slot it uses, so
that one version, many and the base are the same launch; what a row gets does not depend on the others.
"""

from __future__ import annotations

import string

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

WARPS = 8
MANY_ROWS = 128
"""From here on a warp reads a row; where there are fewer, several share one, so that more of the device is busy."""
FEW_ROWS_WARPS = 4
OUTPUTS = 512
"""Outputs of one block, two a thread."""
MOST_RANK = 128
"""The inner products of a block's rows lie in shared memory, which is laid out when a kernel is compiled."""

BODY = string.Template(
    """
  const int tid = $thread, lane = tid % 32, warp = tid / 32;
  const int count = x_shape[0], width = x_shape[1], outs = y_shape[1], rank = a_shape[1], stride = b_shape[2];
  const int first = $block_y * ROWS;
  const int from = $block_x * OUTPUTS;
  const bool one = rows_shape[0] == 1;
  SHARED float inner[SHARED_BY][ROWS][MOST_RANK];

  bool alike = true;
  const int slot_of_first = int(rows[one ? 0 : first]);
  for (int r = 1; r < ROWS; ++r) {
    if (!one && first + r < count) alike = alike && int(rows[first + r]) == slot_of_first;
  }
  {
    const int r = warp / SHARED_BY, part = warp % SHARED_BY;
    const int row = first + r;
    const int slot = row < count ? int(rows[one ? 0 : row]) : 0;
    for (int tile = 0; tile < rank; tile += TILE) {
      float sum[TILE];
      for (int j = 0; j < TILE; ++j) sum[j] = 0.0f;
      if (slot != 0) {
        for (int k = (part * 32 + lane) * VEC; k < width; k += 32 * SHARED_BY * VEC) {
          float mine[VEC], theirs[VEC];
          numbers_of(*(const DEVICE uint4*)(x + (size_t)row * width + k), mine);
          #pragma unroll
          for (int j = 0; j < TILE; ++j) {
            numbers_of(*(const DEVICE uint4*)(a + ((size_t)slot * rank + tile + j) * width + k), theirs);
            for (int i = 0; i < VEC; ++i) sum[j] += mine[i] * theirs[i];
          }
        }
      }
      #pragma unroll
      for (int j = 0; j < TILE; ++j) {
        for (int step = 1; step < 32; step *= 2) sum[j] += SHUFFLE(sum[j], step);
        if (lane == 0) inner[part][r][tile + j] = sum[j];
      }
    }
  }
  BARRIER();
  for (int at = tid; at < ROWS * rank; at += 32 * WARPS) {
    float total = 0.0f;
    for (int part = 0; part < SHARED_BY; ++part) total += inner[part][at / rank][at % rank];
    inner[0][at / rank][at % rank] = total;
  }
  BARRIER();
  for (int column = from + tid; column < from + OUTPUTS && column < outs; column += 32 * WARPS) {
    float added[ROWS];
    for (int r = 0; r < ROWS; ++r) added[r] = 0.0f;
    if (alike) {
      if (slot_of_first != 0) {
        #pragma unroll 8
        for (int j = 0; j < rank; ++j) {
          const float up = float(b[((size_t)slot_of_first * rank + j) * stride + column]);
          for (int r = 0; r < ROWS; ++r) added[r] += inner[0][r][j] * up;
        }
      }
    } else {
      for (int r = 0; r < ROWS; ++r) {
        const int slot = first + r < count ? int(rows[first + r]) : 0;
        if (slot == 0) continue;
        #pragma unroll 8
        for (int j = 0; j < rank; ++j) {
          added[r] += inner[0][r][j] * float(b[((size_t)slot * rank + j) * stride + column]);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const int row = first + r;
      if (row >= count) continue;
      float value = float(y[(size_t)row * outs + column]) + added[r];
      $scale
      out[(size_t)row * outs + column] = T(value);
    }
  }
"""
)
SCALE = """
      value *= float(gain[(size_t)int(rows[one ? 0 : row]) * outs + column]);
"""
BIAS = """
      value += float(bias[column]);
"""


class DecodeKernel:
    """Compiled when it is first needed, once for layers of every shape."""

    def __init__(self, device: Device, compiler: Compiler = compile_kernel) -> None:
        self._device, self._compiler = device, compiler
        self._kernels: dict[tuple[int, int, str, bool, bool], Launch] = {}

    def takes(self, x: mx.array, width: int, rank: int, dtype: mx.Dtype) -> bool:
        """Returns whether it is written for x [rows, …, in] of this many inputs: one token a row, in the dtype of the
        stack."""
        one_token = x.size == x.shape[0] * width
        whole = width % _numbers(dtype) == 0 and rank % 8 == 0 and 0 < rank <= MOST_RANK
        # No vector is read from an array in Metal's constant space.
        whole = whole and x.size >= CONSTANT
        return one_token and whole and x.dtype == dtype and dtype in (mx.float32, mx.bfloat16, mx.float16)

    def __call__(
        self,
        x: mx.array,
        y: mx.array,
        a: mx.array,
        b: mx.array,
        rows: mx.array,
        gain: mx.array | None = None,
        bias: mx.array | None = None,
    ) -> mx.array:
        """gain[slot] · (y + (x · A[slot]) · B[slot]) + bias for x [rows, …, in] and y [rows, …, out], in float32 and
        rounded once. a [slots, rank, in], b [slots, rank, at least out]; rows uint32, a slot for each row or one
        for all; slot 0 adds nothing. `bias` [out] only where there is a `gain` [slots, out]."""
        count, out = x.shape[0], y.shape[-1]
        sharing = 1 if count >= MANY_ROWS else FEW_ROWS_WARPS
        dtype = str(y.dtype).removeprefix("mlx.core.")
        # Ranks are multiples of eight; sixteen at once read a row half as often.
        kind = (16 if a.shape[1] % 16 == 0 else 8, sharing, dtype, gain is not None, bias is not None)
        if kind not in self._kernels:
            self._kernels[kind] = self._make(*kind)
        optional = [array for array in (gain, bias) if array is not None]
        outputs = self._kernels[kind](
            inputs=[x.reshape(count, -1), y.reshape(count, out), a, b, rows, *optional],
            template=[("T", y.dtype)],
            grid=(-(-out // OUTPUTS) * 32 * WARPS, -(-count // (WARPS // sharing)), 1),
            threadgroup=(32 * WARPS, 1, 1),
            output_shapes=[(count, out)],
            output_dtypes=[y.dtype],
        )
        return outputs[0].reshape(y.shape)

    def _make(self, tile: int, sharing: int, dtype: str, scaled: bool, biased: bool) -> Launch:
        given = constants(
            SHARED_BY=sharing, ROWS=WARPS // sharing, WARPS=WARPS, OUTPUTS=OUTPUTS, MOST_RANK=MOST_RANK, TILE=tile,
            VEC=4 if dtype == "float32" else 8,
        )  # fmt: skip
        return self._compiler(
            self._device,
            f"low_rank_{dtype}",
            ["x", "y", "a", "b", "rows", *(["gain"] if scaled else []), *(["bias"] if biased else [])],
            ["out"],
            given + BODY.substitute(INDICES[self._device], scale=SCALE * scaled + BIAS * biased),
            macros(self._device) + NUMBERS[dtype],
        )


def _numbers(dtype: mx.Dtype) -> int:
    """Numbers in 16 bytes, which one lane reads at once."""
    return 16 // dtype.size


def decode_kernel() -> DecodeKernel | None:
    """That of the default device; None where there is none, as on a CPU."""
    device = own_device()
    return None if device is None else DecodeKernel(device)
