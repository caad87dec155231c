"""Exponentials of logits, sums over a vocabulary, and the largest of it: what sampling and scoring are made of.

Each has a form for the CPU, where MLX's own exp, row sums and partitions would be a quarter of a decode step."""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx

# Taylor coefficients of 2^f on [-0.5, 0.5]: ln(2)^n / n!.
_EXP2 = (
    1.0,
    0.6931471805599453,
    0.2402265069591007,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.00015403530393381608,
)
_ROUND = 12582912.0  # 1.5·2²³: adding it leaves the nearest integer in the low bits of a float32
_TINY = 2.0**-126
LARGEST = 87.0
"""What `exponential` takes, at most."""
FANOUT, MOST = 16, 128
"""Entries of a block in `pyramid`, and of its top."""


def on_cpu() -> bool:
    return bool(mx.default_device() == mx.cpu)


def exponential(x: mx.array) -> mx.array:
    """exp of float32 values that are at most `LARGEST`; exactly 0 below about −87.

    MLX's exp on the CPU is scalar and would be a quarter of a decode step (12 ms for 32 × 16,384 against 3 ms here);
    the polynomial's relative error is that of MLX's own: 1e-7 near 0, 2e-6 at 1e-30."""
    if not on_cpu():
        return mx.exp(x)
    power = mx.maximum(x * 1.4426950408889634, -126.0)
    rounded = power + _ROUND
    fraction = power - (rounded - _ROUND)
    result = _EXP2[-1] * fraction + _EXP2[-2]
    for coefficient in _EXP2[-3::-1]:
        result = result * fraction + coefficient
    # Adds the integer part to the exponent bits.
    return (result.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32) - _TINY


def exponentials_of(logits: mx.array, peak: mx.array) -> mx.array:
    """exp(logits − peak), float32 [R, V], of logits [R, V] of any float dtype and the largest of each row [R, 1]."""
    return exponential(logits.astype(mx.float32) - peak) if on_cpu() else _in_one_kernel(logits, peak)


@partial(mx.compile, shapeless=True)
def _in_one_kernel(logits: mx.array, peak: mx.array) -> mx.array:
    """A GPU would write and read [R, V] twice more for the cast and the difference."""
    return mx.exp(logits.astype(mx.float32) - peak)


def block_size(vocabulary: int) -> int:
    """The largest divisor of the vocabulary in 32…512, or 128 with padding when there is none."""
    return next((size for size in range(512, 31, -1) if vocabulary % size == 0), 128)


def blocks_of(values: mx.array) -> mx.array:
    """[R, V] → [R, blocks, block size], padded with zeros where the vocabulary has no suitable divisor."""
    rows, vocabulary = values.shape
    size = block_size(vocabulary)
    if vocabulary % size:
        values = mx.pad(values, [(0, 0), (0, -vocabulary % size)])
    return values.reshape(rows, -1, size)


def block_sums(values: mx.array) -> mx.array:
    """[R, V] → [R, blocks]. One float32 sum over 152k exponentials is off by 3e-4 nat, a sum of block sums by 2e-6."""
    return _sums(blocks_of(values))


def pyramid(weights: mx.array) -> list[mx.array]:
    """Weights [R, V] in blocks [R, ⌈V/16⌉, 16], the sums of those in blocks again, and so on up to [R, at most 128];
    padded with zeros. Finest first."""
    levels = []
    while weights.shape[-1] > MOST:
        rows, count = weights.shape
        if count % FANOUT:
            weights = mx.pad(weights, [(0, 0), (0, -count % FANOUT)])
        levels.append(weights.reshape(rows, -1, FANOUT))
        weights = _sums(levels[-1])
    return [*levels, weights]


def _sums(blocks: mx.array) -> mx.array:
    """[R, blocks, size] → [R, blocks]."""
    if not on_cpu():
        # Not as a product: CUDA may round its factors to TF32.
        return blocks.sum(axis=-1)
    # BLAS sums five times as fast as MLX's reduction over rows.
    rows, count, size = blocks.shape
    return (blocks.reshape(rows * count, size) @ mx.ones((size, 1))).reshape(rows, count)


def in_columns(values: mx.array, height: int) -> mx.array:
    """[R, V] → [R, height, V/height], padded with −inf: token t stands in column t mod width. A reduction over axis 1
    runs along the memory, two to three times as fast as over a row."""
    rows, vocabulary = values.shape
    if vocabulary % height:
        values = mx.pad(values, [(0, 0), (0, -vocabulary % height)], constant_values=-math.inf)
    return values.reshape(rows, height, -1)


def peak_of(values: mx.array) -> mx.array:
    """The largest of each row, [R, V] → [R, 1]."""
    if not on_cpu():
        return mx.max(values, axis=-1, keepdims=True)
    return mx.max(mx.max(in_columns(values, block_size(values.shape[-1])), axis=1), axis=-1, keepdims=True)


def largest(values: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest of each row of float32 [R, V], best first: ids int32 [R, k] and values [R, k].

    They stand in the k columns whose largest are largest, so two partitions of about √(V·k) replace one of V."""
    vocabulary = values.shape[-1]
    height = 2 ** round(math.log2(max(1.0, vocabulary / k)) / 2)
    width = -(-vocabulary // height)
    if k >= width or height * k + width > vocabulary // 2:
        ids = mx.argpartition(-values, k - 1, axis=-1)[:, :k] if k < vocabulary else mx.argsort(-values, axis=-1)
        found = mx.take_along_axis(values, ids, axis=-1)
    else:
        columns = in_columns(values, height)
        chosen = mx.argpartition(-mx.max(columns, axis=1), k - 1, axis=-1)[:, None, :k].astype(mx.int32)
        found = mx.take_along_axis(columns, chosen, axis=2).reshape(-1, height * k)
        step = mx.arange(height, dtype=mx.int32)[None, :, None] * width
        ids = (step + chosen).reshape(-1, height * k)
        part = mx.argpartition(-found, k - 1, axis=-1)[:, :k]
        ids, found = mx.take_along_axis(ids, part, axis=-1), mx.take_along_axis(found, part, axis=-1)
    order = mx.argsort(-found, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1).astype(mx.int32), mx.take_along_axis(found, order, axis=-1)
