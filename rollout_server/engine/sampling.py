"""One sampler call for the whole batch: `prepare` turns rows into arrays, `sample` turns logits into tokens.

Everything is float32 from the logits on. The order is temperature, top-k, top-p, min-p, each on the renormalised
result of the one before, as transformers' logits warpers do; tokens tied with the last kept one are kept too.
A draw depends on (row seed, index of the token) alone: two uniforms are computed on the host by a counter-based hash,
the first picks a block of the vocabulary, the second a token in it (a single float32 uniform has only 24 bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rollout_server.rollout import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), uint64 → uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """float32 [R, 2] in [0, 1 − 2⁻²³], a pure function of each row's seed and token index."""
    with np.errstate(over="ignore"):
        seed = _mix(np.asarray(seeds, dtype=np.uint64) + _GOLDEN)
        stream = _mix(seed ^ _mix((np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN))
        bits = np.stack([_mix(stream + _GOLDEN), _mix(stream + _GOLDEN + _GOLDEN)], axis=-1)
    # 23 bits: with 24, u·total could round up to total and no token would be found.
    return (bits >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)


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


def exponential(x: mx.array) -> mx.array:
    """exp of float32 values that are at most 0; exactly 0 below about −87.

    MLX's exp on the CPU is scalar and would be a quarter of a decode step (12 ms for 32 × 16,384 against 3 ms here);
    the polynomial's relative error is that of MLX's own: 1e-7 near 0, 2e-6 at 1e-30."""
    if mx.default_device() != mx.cpu:
        return mx.exp(x)
    power = mx.maximum(x * 1.4426950408889634, -126.0)
    rounded = power + _ROUND
    fraction = power - (rounded - _ROUND)
    result = _EXP2[-1] * fraction + _EXP2[-2]
    for coefficient in _EXP2[-3::-1]:
        result = result * fraction + coefficient
    # Adds the integer part to the exponent bits.
    return (result.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32) - _TINY


@dataclass(frozen=True, slots=True, eq=False)
class SamplerArrays:
    """Per-row parameters on the device, and what the whole batch lets us skip. Rebuilt when rows change."""

    inverse_temperature: mx.array | None
    """float32 [R, 1]; None when every sampled row has temperature 1."""
    greedy: mx.array | None
    """bool [R]; None when no row is greedy."""
    all_greedy: bool
    filtered: mx.array | None
    """int32 [F]: the rows that filter."""
    is_filtered: mx.array | None
    """bool [R]."""
    top_k: mx.array | None
    """int32 [F, 1], vocabulary size where off."""
    top_p: mx.array | None
    """float32 [F, 1]."""
    min_p: mx.array | None
    """float32 [F, 1]."""
    entropy: bool
    top_logprobs: int


def prepare(
    rows: Sequence[SamplingParams | None], vocabulary: int, *, entropy: bool, top_logprobs: int
) -> SamplerArrays:
    """`None` marks a place without a row; it samples greedily and its result is thrown away."""
    temperatures = [0.0 if row is None else row.temperature for row in rows]
    greedy = np.array([t == 0 for t in temperatures])
    filtered = [i for i, row in enumerate(rows) if row is not None and row.filtered]
    tempered = any(t not in (0.0, 1.0) for t in temperatures)
    chosen = [row for row in rows if row is not None and row.filtered]
    column = [1.0 / t if t > 0 else 1.0 for t in temperatures]
    mask = np.zeros(len(rows), dtype=bool)
    mask[filtered] = True
    live_greedy = any(row is not None and row.temperature == 0 for row in rows)
    return SamplerArrays(
        inverse_temperature=mx.array(column, dtype=mx.float32)[:, None] if tempered else None,
        greedy=mx.array(greedy) if live_greedy else None,
        all_greedy=bool(greedy.all()),
        filtered=mx.array(filtered, dtype=mx.int32) if filtered else None,
        is_filtered=mx.array(mask) if filtered else None,
        top_k=mx.array([[min(r.top_k or vocabulary, vocabulary)] for r in chosen], dtype=mx.int32) if chosen else None,
        top_p=mx.array([[r.top_p] for r in chosen], dtype=mx.float32) if chosen else None,
        min_p=mx.array([[r.min_p] for r in chosen], dtype=mx.float32) if chosen else None,
        entropy=entropy,
        top_logprobs=min(top_logprobs, vocabulary),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """One step's outcome for every place, on the device. `values` float32 [3 or 4, R]: logprobs, sampling_logprobs,
    log_kept_mass and, if asked for, entropy."""

    ids: mx.array
    values: mx.array
    top_ids: mx.array | None
    top_logprobs: mx.array | None

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.ids, self.values, self.top_ids, self.top_logprobs) if a is not None]


def block_size(vocabulary: int) -> int:
    """The largest divisor of the vocabulary in 32…512, or 128 with padding when there is none."""
    return next((size for size in range(512, 31, -1) if vocabulary % size == 0), 128)


def _threshold(weights: mx.array, arrays: SamplerArrays) -> mx.array:
    """The smallest of the unnormalised probabilities [F, V] that the filters keep, [F, 1]."""
    if arrays.top_k is None or arrays.top_p is None or arrays.min_p is None:
        raise ValueError("No row of this batch filters.")
    ordered = -mx.sort(-weights, axis=-1)
    running = mx.cumsum(ordered, axis=-1)
    rank = mx.arange(weights.shape[-1], dtype=mx.int32)[None]
    kept = rank < arrays.top_k
    mass = mx.take_along_axis(running, arrays.top_k - 1, axis=-1)
    # The token that crosses top_p stays: what counts is the mass before it. The first token always stays.
    kept = kept & ((running - ordered < arrays.top_p * mass) | (rank == 0))
    kept = kept & (ordered >= arrays.min_p * ordered[:, :1])
    last = mx.sum(kept, axis=-1, keepdims=True) - 1
    return mx.take_along_axis(ordered, last, axis=-1)


def blocks_of(values: mx.array) -> mx.array:
    """[R, V] → [R, blocks, block size], padded with zeros where the vocabulary has no suitable divisor."""
    rows, vocabulary = values.shape
    size = block_size(vocabulary)
    if vocabulary % size:
        values = mx.pad(values, [(0, 0), (0, -vocabulary % size)])
    return values.reshape(rows, -1, size)


def block_sums(values: mx.array) -> mx.array:
    """[R, V] → [R, blocks]. One float32 sum over 152k exponentials is off by 3e-4 nat, a sum of block sums by 2e-6."""
    return blocks_of(values).sum(axis=-1)


def _draw(weights: mx.array, sums: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """Inverse-CDF draw from unnormalised probabilities [R, V] with their `block_sums`; returns ids int32 [R] and the
    total weight [R, 1]."""
    blocks = blocks_of(weights)
    running = mx.cumsum(sums, axis=-1)
    total = running[:, -1:]
    block = mx.argmax((running > uniform[:, :1] * total) & (sums > 0), axis=-1)
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    running = mx.cumsum(inside, axis=-1)
    token = mx.argmax((running > uniform[:, 1:] * running[:, -1:]) & (inside > 0), axis=-1)
    return (block * blocks.shape[-1] + token).astype(mx.int32), total


def sample(
    logits: mx.array,
    arrays: SamplerArrays,
    uniform: mx.array,
    banned: tuple[mx.array, mx.array] | None = None,
) -> Sampled:
    """logits [R, V] of any float dtype, uniform float32 [R, 2] → one token a row. `banned` are (row, token) pairs
    taken out of the sampling distribution (but not out of `logprobs`). Non-finite logits give non-finite logprobs."""
    raw = logits.astype(mx.float32)
    peak = mx.max(raw, axis=-1, keepdims=True)
    shifted = raw - peak
    exponentials = exponential(shifted)
    # Subtracting the peak and the logarithm one after the other keeps the last bits that their sum would round away.
    sums = block_sums(exponentials)
    log_total = mx.log(mx.sum(sums, axis=-1, keepdims=True))
    shaped = raw
    if banned is not None:
        shaped = raw + 0.0
        shaped[banned[0], banned[1]] = -mx.inf
    best = mx.argmax(shaped, axis=-1).astype(mx.int32) if arrays.greedy is not None or arrays.all_greedy else None
    if arrays.all_greedy and best is not None:
        ids = best
        sampling = mx.zeros(ids.shape, dtype=mx.float32)
        kept = mx.full(ids.shape, mx.nan)
    else:
        ids, sampling, kept = _sample_rows(
            shaped, (exponentials, sums, peak) if banned is None else None, arrays, uniform
        )
        if arrays.greedy is not None and best is not None:
            ids = mx.where(arrays.greedy, best, ids)
            sampling = mx.where(arrays.greedy, 0.0, sampling)
            kept = mx.where(arrays.greedy, mx.nan, kept)
    logprobs = (mx.take_along_axis(shifted, ids[:, None], axis=-1) - log_total)[:, 0]
    values = [logprobs, sampling, kept]
    if arrays.entropy:
        values.append(entropy_of(shifted, exponentials, log_total))
    top_ids = top_logprobs = None
    if arrays.top_logprobs:
        top_ids, top_logprobs = top_of(shifted, log_total, arrays.top_logprobs)
    return Sampled(ids, mx.stack(values), top_ids, top_logprobs)


def _sample_rows(
    shaped: mx.array,
    known: tuple[mx.array, mx.array, mx.array] | None,
    arrays: SamplerArrays,
    uniform: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """ids int32 [R], sampling_logprobs and log_kept_mass float32 [R]. `known` are exponentials, block sums and peak of
    `shaped`, which serve as they are where every row has temperature 1."""
    if known is None or arrays.inverse_temperature is not None:
        if arrays.inverse_temperature is not None:
            shaped = shaped * arrays.inverse_temperature
        peak = mx.max(shaped, axis=-1, keepdims=True)
        weights = exponential(shaped - peak)
        sums = block_sums(weights)
    else:
        weights, sums, peak = known
    everything = sums
    if arrays.filtered is not None:
        threshold = mx.zeros((weights.shape[0], 1), dtype=mx.float32)
        threshold[arrays.filtered] = _threshold(mx.take(weights, arrays.filtered, axis=0), arrays)
        weights = weights * (weights >= threshold)
        sums = block_sums(weights)
    ids, total = _draw(weights, sums, uniform)
    chosen = mx.take_along_axis(shaped, ids[:, None], axis=-1)
    sampling = (chosen - peak - mx.log(total))[:, 0]
    kept = mx.zeros(ids.shape, dtype=mx.float32)
    if arrays.is_filtered is not None:
        all_mass = mx.sum(everything, axis=-1, keepdims=True)
        kept = mx.where(arrays.is_filtered, mx.minimum(mx.log(total / all_mass), 0.0)[:, 0], kept)
    return ids, sampling, kept


def entropy_of(shifted: mx.array, exponentials: mx.array, log_total: mx.array) -> mx.array:
    """Entropy in nats, float32 [R], of the distribution whose logits less their peak are `shifted` [R, V]."""
    # Bounded below, because 0 × −inf is NaN.
    mean = mx.sum(block_sums(exponentials * mx.maximum(shifted, -1e30)), axis=-1) * mx.exp(-log_total)[:, 0]
    return log_total[:, 0] - mean


def top_of(shifted: mx.array, log_total: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest of float32 logits less their peak [R, V], best first: ids int32 [R, k] and log-probabilities
    float32 [R, k]."""
    if k >= shifted.shape[-1]:
        chosen = mx.argsort(-shifted, axis=-1)
    else:
        part = mx.argpartition(-shifted, k - 1, axis=-1)[:, :k]
        order = mx.argsort(-mx.take_along_axis(shifted, part, axis=-1), axis=-1)
        chosen = mx.take_along_axis(part, order, axis=-1)
    return chosen.astype(mx.int32), mx.take_along_axis(shifted, chosen, axis=-1) - log_total
