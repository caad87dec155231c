"""One sampler call for the whole batch: `prepare` turns rows into arrays, `sample` turns logits into tokens.

Everything is float32 from the logits on. Penalties, bias and masks come first, then temperature, top-k, top-p, min-p,
each on the renormalised result of the one before, as transformers' logits warpers do; tokens tied with the last one
kept are kept too.
A draw depends on (row seed, index of the token) alone: its uniforms are computed on the host by a counter-based hash.
The first picks a large block of the vocabulary, the next a smaller one in it, the last a token (a single float32
uniform has only 24 bits). Logits of one row differ in their last bits alone and in a batch, and a uniform on the border
of two entries then picks the other one; few boundaries at each level, and sums of few numbers, keep that rare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rollout_server.engine.sampling.filter_kernel import FilterKernel, KernelFilters
from rollout_server.engine.sampling.filters import Filters, RowSubset, prepare_filters
from rollout_server.engine.sampling.logits_processors import (
    Bans,
    Bias,
    Pairs,
    Penalties,
    allowed_only,
    prepare_bans,
    prepare_bias,
    prepare_penalties,
    without,
)
from rollout_server.engine.sampling.numerics import (
    FANOUT,
    block_sums,
    exponentials_of,
    largest,
    on_cpu,
    peak_of,
    pyramid,
)
from rollout_server.rollout import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), uint64 → uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: Sequence[int] | np.ndarray, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """float32 [R, 5] in [0, 1 − 2⁻²³], a pure function of each row's seed and token index: as many as `pyramid` has
    levels for eight million tokens."""
    with np.errstate(over="ignore"):
        seed = _mix(np.asarray(seeds, dtype=np.uint64) + _GOLDEN)
        stream = _mix(seed ^ _mix((np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN))
        bits = _mix(stream[..., None] + np.arange(1, 6, dtype=np.uint64) * _GOLDEN)
    # 23 bits: with 24, u·total could round up to total and no token would be found.
    return (bits >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)


@dataclass(frozen=True, slots=True, eq=False)
class SamplerArrays:
    """Per-row parameters on the device, and what the whole batch lets us skip. Rebuilt when rows change."""

    inverse_temperature: mx.array | None
    """float32 [R, 1]; None when every sampled row has temperature 1."""
    greedy: mx.array | None
    """bool [R]; None when no row is greedy."""
    all_greedy: bool
    filters: Filters | KernelFilters | None
    penalties: Penalties | None
    bias: Bias | None
    bans: Bans | None
    entropy: bool
    top_logprobs: int


def prepare(
    rows: Sequence[SamplingParams | None],
    vocabulary: int,
    *,
    entropy: bool,
    top_logprobs: int,
    eos: frozenset[int] = frozenset(),
    kernel: FilterKernel | None = None,
) -> SamplerArrays:
    """`None` marks a place without a row; it samples greedily and its result is thrown away. `eos` are the end tokens
    that rows with `min_tokens` hold back. `kernel` filters where this device has one that
    knows their filters."""
    temperatures = [0.0 if row is None else row.temperature for row in rows]
    greedy = np.array([t == 0 for t in temperatures])
    tempered = any(t not in (0.0, 1.0) for t in temperatures)
    column = [1.0 / t if t > 0 else 1.0 for t in temperatures]
    live = [row for row in rows if row is not None]
    live_greedy = any(row.temperature == 0 for row in live)
    return SamplerArrays(
        inverse_temperature=mx.array(column, dtype=mx.float32)[:, None] if tempered else None,
        greedy=mx.array(greedy) if live_greedy else None,
        all_greedy=bool(greedy.all()),
        filters=_filters(rows, vocabulary, kernel) if any(row.filtered for row in live) else None,
        penalties=prepare_penalties(rows) if any(row.penalised for row in live) else None,
        bias=prepare_bias(rows) if any(row.logit_bias for row in live) else None,
        bans=prepare_bans(rows, eos) if any(row.min_tokens for row in live) else None,
        entropy=entropy,
        top_logprobs=min(top_logprobs, vocabulary),
    )


def _filters(
    rows: Sequence[SamplingParams | None], vocabulary: int, kernel: FilterKernel | None
) -> Filters | KernelFilters | None:
    if kernel is not None and kernel.takes(rows):
        return kernel.prepare(rows, vocabulary)
    return prepare_filters(rows, vocabulary, narrow=on_cpu())


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


def _draw(levels: Sequence[mx.array], uniform: mx.array) -> tuple[mx.array, mx.array]:
    """Inverse-CDF draw from the `pyramid` of unnormalised probabilities [R, V], its top first; returns ids int32 [R]
    and the total weight [R, 1]."""
    top, finer = levels[-1], levels[-2::-1]
    running = mx.cumsum(top, axis=-1)
    total = running[:, -1:]
    index = mx.argmax((running > uniform[:, :1] * total) & (top > 0), axis=-1)
    for number, blocks in enumerate(finer, 1):
        inside = mx.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]
        running = mx.cumsum(inside, axis=-1)
        bound = uniform[:, number : number + 1] * running[:, -1:]
        index = index * FANOUT + mx.argmax((running > bound) & (inside > 0), axis=-1)
    return index.astype(mx.int32), total


def sample(
    logits: mx.array,
    arrays: SamplerArrays,
    uniform: mx.array,
    banned: Pairs | None = None,
    *,
    seen: mx.array | None = None,
    mask: RowSubset | None = None,
) -> Sampled:
    """logits [R, V] of any float dtype, uniform float32 [R, 5] → one token a row. `seen` is what `TokenCounts` holds,
    `banned` are (row, token) pairs that may not come, `mask` says of some rows which tokens may (`allowed_only`); they
    change the sampling distribution, not `logprobs`. Non-finite logits give non-finite logprobs."""
    # Computed only where it is used: the logits may be half as large, and their order is the same.
    raw = logits.astype(mx.float32)
    peak = peak_of(logits).astype(mx.float32)
    exponentials = exponentials_of(logits, peak)
    # Subtracting the peak and the logarithm one after the other keeps the last bits that their sum would round away.
    levels = pyramid(exponentials)
    log_total = mx.log(mx.sum(levels[-1], axis=-1, keepdims=True))
    shaped = shape(raw, arrays, seen, banned)
    masked = None if mask is None else RowSubset(mask.rows, allowed_only(shaped, mask))
    best = _best(shaped, masked) if arrays.greedy is not None or arrays.all_greedy else None
    if arrays.all_greedy and best is not None:
        ids = best
        sampling = mx.zeros(ids.shape, dtype=mx.float32)
        kept = mx.full(ids.shape, mx.nan)
    else:
        unshaped = shaped is raw
        known = (exponentials, levels, peak) if unshaped else None
        ids, sampling, kept = _sample_rows(logits if unshaped else shaped, known, masked, arrays, uniform)
        if arrays.greedy is not None and best is not None:
            ids = mx.where(arrays.greedy, best, ids)
            sampling = mx.where(arrays.greedy, 0.0, sampling)
            kept = mx.where(arrays.greedy, mx.nan, kept)
    logprobs = (_at(logits, ids) - peak - log_total)[:, 0]
    values = [logprobs, sampling, kept]
    if arrays.entropy:
        values.append(entropy_of(raw - peak, exponentials, log_total))
    top_ids = top_logprobs = None
    if arrays.top_logprobs:
        top_ids, top_logprobs = top_of(raw - peak, log_total, arrays.top_logprobs)
    return Sampled(ids, mx.stack(values), top_ids, top_logprobs)


def shape(
    raw: mx.array,
    arrays: SamplerArrays,
    seen: mx.array | None,
    banned: Pairs | None,
) -> mx.array:
    """The logits that are sampled from, masks apart; `raw` itself, untouched, where nothing changes them."""
    shaped = raw
    if arrays.penalties is not None:
        if seen is None:
            raise ValueError("Rows are penalised, but their tokens were not counted.")
        shaped = arrays.penalties.apply(shaped, seen)
    if arrays.bias is not None:
        shaped = shaped.at[arrays.bias.places, arrays.bias.tokens].add(arrays.bias.values)
    if banned is not None:
        shaped = without(shaped, banned)
    return shaped


def _at(values: mx.array, ids: mx.array) -> mx.array:
    """One of each row [R, V] by ids [R], float32 [R, 1]."""
    return mx.take_along_axis(values, ids[:, None], axis=-1).astype(mx.float32)


def _best(shaped: mx.array, masked: RowSubset | None) -> mx.array:
    """The most probable token of each row, int32 [R]."""
    best = mx.argmax(shaped, axis=-1).astype(mx.int32)
    return best if masked is None else masked.put(best, mx.argmax(masked.values, axis=-1).astype(mx.int32))


def _sample_rows(
    shaped: mx.array,
    known: tuple[mx.array, list[mx.array], mx.array] | None,
    masked: RowSubset | None,
    arrays: SamplerArrays,
    uniform: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """ids int32 [R], sampling_logprobs and log_kept_mass float32 [R]. `shaped` are logits of any float dtype. `known`
    are their exponentials, the pyramid of these and the peak, which serve as they are where every row has temperature
    1; `masked` are the rows of `shaped` that have a mask, under it."""
    if known is None or arrays.inverse_temperature is not None:
        # The largest stays the largest when all are multiplied by what is above 0, rounding included.
        peak = peak_of(shaped) if known is None else known[2]
        if arrays.inverse_temperature is not None:
            shaped = shaped.astype(mx.float32) * arrays.inverse_temperature
            peak = peak * arrays.inverse_temperature
        weights = exponentials_of(shaped, peak)
        levels = pyramid(weights)
    else:
        weights, levels, peak = known
    if masked is not None:
        # Only these are exponentiated anew. Arrays of their own, because `put` writes in place.
        theirs = masked.values
        if arrays.inverse_temperature is not None:
            theirs = theirs * masked.of(arrays.inverse_temperature)
        highest = peak_of(theirs)
        weights = masked.put(weights + 0.0, exponentials_of(theirs, highest))
        levels, peak = pyramid(weights), masked.put(peak + 0.0, highest)
    everything = mx.sum(levels[-1], axis=-1, keepdims=True)
    if arrays.filters is not None:
        weights = arrays.filters.keep(weights, everything)
        levels = pyramid(weights)
    ids, total = _draw(levels, uniform)
    sampling = (_at(shaped, ids) - peak - mx.log(total))[:, 0]
    kept = mx.zeros(ids.shape, dtype=mx.float32)
    if arrays.filters is not None:
        kept = mx.where(arrays.filters.filtered, mx.minimum(mx.log(total / everything), 0.0)[:, 0], kept)
    return ids, sampling, kept


def entropy_of(shifted: mx.array, exponentials: mx.array, log_total: mx.array) -> mx.array:
    """Entropy in nats, float32 [R], of the distribution whose logits less their peak are `shifted` [R, V]."""
    # Bounded below, because 0 × −inf is NaN.
    mean = mx.sum(block_sums(exponentials * mx.maximum(shifted, -1e30)), axis=-1) * mx.exp(-log_total)[:, 0]
    return log_total[:, 0] - mean


def top_of(shifted: mx.array, log_total: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest of float32 logits less their peak [R, V], best first: ids int32 [R, k] and log-probabilities
    float32 [R, k]."""
    ids, values = largest(shifted, k)
    return ids, values - log_total


def warm_sampler(vocabulary: int, dtype: mx.Dtype, rows: int, kernel: FilterKernel | None = None) -> None:
    """Runs every kind of sampler once on `rows` rows of logits in the model's dtype."""
    logits = mx.zeros((rows, vocabulary), dtype=dtype)
    draws = mx.array(uniforms(range(rows), [0] * rows))
    for sampling, extras in _kinds():
        arrays = prepare(
            [sampling, *[SamplingParams(max_tokens=1)] * (rows - 1)],
            vocabulary,
            entropy=extras,
            top_logprobs=5 if extras else 0,
            kernel=kernel,
        )
        mx.eval(sample(logits, arrays, draws).arrays())


def _kinds() -> Iterator[tuple[SamplingParams, bool]]:
    yield SamplingParams(max_tokens=1), False
    yield SamplingParams(max_tokens=1), True
    yield SamplingParams(max_tokens=1, temperature=0.0), False
    yield SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9, top_k=50, min_p=0.01), False
    yield SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9), False
    yield SamplingParams(max_tokens=1, logit_bias=((0, 1.0),)), False
