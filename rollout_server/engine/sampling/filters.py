"""Top-k, top-p and min-p of a whole batch as one number a row: the smallest unnormalised probability that stays.

A token stays if fewer than k are more probable, if the mass of the more probable ones is below top_p of what top-k
left, and if it has at least min_p of the best one's probability. Tokens of one probability stay or go together. No
search sorts the vocabulary: on the CPU halves are cut off (`descend`: 7 ms for 32 × 16,384, where sorting takes 40),
on a GPU, where a partition is a sort, `filter_kernel` finds the number digit by digit, or, where that kernel cannot be
used, `bisect` bit by bit. None takes more passes for one distribution than for another, and none leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from rollout_server.engine.sampling.numerics import block_sums, largest, on_cpu
from rollout_server.rollout import SamplingParams

NARROW = 512
"""Rows whose top_k is at most this take their candidates from the few largest."""
LEAF = 512
"""Candidates that are left when `descend` sorts them."""
ONE_BITS = 0x3F800000
"""1.0 as float32: floats that are not negative are ordered as their bits."""


@dataclass(frozen=True, slots=True, eq=False)
class RowSubset:
    """Some rows of the batch and one parameter of each, [F, 1]."""

    rows: mx.array | None
    """int32 [F]; None: all of them, in order."""
    values: mx.array

    def of(self, array: mx.array) -> mx.array:
        """Their rows of [R, …]."""
        return array if self.rows is None else mx.take(array, self.rows, axis=0)

    def put(self, into: mx.array, values: mx.array) -> mx.array:
        if self.rows is None:
            return values
        into[self.rows] = values
        return into


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """What the rows of a batch filter by; None where no row does."""

    filtered: mx.array
    """bool [R]."""
    narrow: RowSubset | None
    """top_k int32 of rows with a small one."""
    narrow_p: mx.array | None
    """Their top_p [F, 1], 2 where it is off."""
    candidates: int
    """The largest top_k among them, rounded up."""
    ranked: RowSubset | None
    """top_k float32 of the other rows that have one."""
    share: RowSubset | None
    """top_p of rows that have one and are not narrow."""
    share_of_ranked: bool
    """True if some of those are among `ranked`."""
    min_p: mx.array | None
    """[R, 1], 0 where it is off."""

    def keep(self, weights: mx.array, total: mx.array) -> mx.array:
        """The weights, with 0 for those that do not stay. `weights` [R, V] are probabilities over that of the best
        token, which is 1 then, and `total` [R, 1] their sums."""
        return weights * (weights >= self.least(weights, total))

    def least(self, weights: mx.array, total: mx.array) -> mx.array:
        """The smallest weight that stays, float32 [R, 1]."""
        search = descend if on_cpu() else bisect
        found = mx.zeros((weights.shape[0], 1), dtype=mx.float32)
        if self.ranked is not None:
            found = self.ranked.put(found, search(self.ranked.of(weights), self.ranked.values, by_rank=True))
        if self.share is not None:
            share = self.share
            theirs, least, mass = share.of(weights), share.of(found), share.of(total)
            if self.share_of_ranked:
                mass = _sum(theirs * (theirs >= least))
            crossing = search(theirs, share.values * mass, by_rank=False)
            found = share.put(found, mx.maximum(least, crossing))
        if self.narrow is not None and self.narrow_p is not None:
            few = _of_few(self.narrow.of(weights), self.narrow.values, self.narrow_p, self.candidates)
            found = self.narrow.put(found, few)
        return found if self.min_p is None else mx.maximum(found, self.min_p)


def prepare_filters(rows: Sequence[SamplingParams | None], vocabulary: int, *, narrow: bool = True) -> Filters | None:
    """None if no row filters. `narrow=False` (a GPU) searches for every row in the same way."""
    chosen = [(place, row) for place, row in enumerate(rows) if row is not None and row.filtered]
    if not chosen:
        return None
    size = len(rows)
    with_k = [(place, row) for place, row in chosen if 0 < row.top_k < vocabulary]
    few = [(place, row) for place, row in with_k if narrow and row.top_k <= NARROW]
    places = {place for place, _ in few}
    ranked = [(place, row) for place, row in with_k if place not in places]
    share = [(place, row) for place, row in chosen if row.top_p < 1 and place not in places]
    flags, least = [False] * size, [[0.0]] * size
    for place, row in chosen:
        flags[place], least[place] = True, [row.min_p]
    most = max((row.top_k for _, row in few), default=1)
    # Powers of two, so that few shapes occur.
    return Filters(
        filtered=mx.array(flags),
        narrow=row_subset(few, [row.top_k for _, row in few], size, mx.int32),
        # What top-p removes with a share above 1 is nothing, whatever the rounding of its sums.
        narrow_p=mx.array([[row.top_p if row.top_p < 1 else 2.0] for _, row in few]) if few else None,
        candidates=min(vocabulary, 1 << (most - 1).bit_length()),
        ranked=row_subset(ranked, [row.top_k for _, row in ranked], size, mx.float32),
        share=row_subset(share, [row.top_p for _, row in share], size, mx.float32),
        share_of_ranked=bool({place for place, _ in ranked} & {place for place, _ in share}),
        min_p=mx.array(least, dtype=mx.float32) if any(row.min_p for _, row in chosen) else None,
    )


def row_subset(
    chosen: Sequence[tuple[int, SamplingParams]], values: Sequence[float], size: int, dtype: mx.Dtype
) -> RowSubset | None:
    if not chosen:
        return None
    rows = None if len(chosen) == size else mx.array([place for place, _ in chosen], dtype=mx.int32)
    return RowSubset(rows, mx.array(list(values), dtype=dtype)[:, None])


def _sum(values: mx.array) -> mx.array:
    return mx.sum(block_sums(values), axis=-1, keepdims=True)


def _of_few(weights: mx.array, top_k: mx.array, top_p: mx.array, candidates: int) -> mx.array:
    """Top-k and top-p where no top_k exceeds `candidates`."""
    _, best = largest(weights, candidates)
    kth = mx.take_along_axis(best, top_k - 1, axis=-1)
    goal = top_p * _sum(weights * (weights >= kth))
    crossing = _first(best, mx.zeros_like(goal), goal)
    return mx.maximum(kth, crossing)


def _first(ordered: mx.array, above: mx.array, goal: mx.array) -> mx.array:
    """The first of descending weights [F, N] at which their sum, with `above` before them, reaches the goal."""
    short = mx.sum(above + mx.cumsum(ordered, axis=-1) < goal, axis=-1, keepdims=True)
    return mx.take_along_axis(ordered, mx.minimum(short, ordered.shape[-1] - 1), axis=-1)


def descend(weights: mx.array, goal: mx.array, *, by_rank: bool) -> mx.array:
    """The largest weight at which the sum of the weights down to it (`by_rank`: their number) reaches the goal,
    [F, V] and [F, 1] → [F, 1]; the smallest weight if none does.

    Quickselect with fixed ranks: each round parts what is left into an upper and a lower half, sums the upper one and
    keeps the half in which the goal is reached, so 2·V weights are parted in all."""
    rows, size = weights.shape
    rounds = max(0, (-(-size // LEAF) - 1).bit_length())
    size = -(-size >> rounds) << rounds
    # As integers: comparing floats has to look for NaN.
    left = mx.pad(weights, [(0, 0), (0, size - weights.shape[-1])]).view(mx.int32)
    above = mx.zeros((rows, 1), dtype=mx.float32)
    halves = mx.arange(rows, dtype=mx.int32) * 2
    for _ in range(rounds):
        size //= 2
        parted = mx.partition(left, size, axis=-1).reshape(2 * rows, size)
        sums = mx.full((rows, 1), float(size)) if by_rank else _sum(parted.view(mx.float32)).reshape(rows, 2)[:, 1:]
        reached = above + sums >= goal
        above = mx.where(reached, above, above + sums)
        left = mx.take(parted, halves + reached[:, 0], axis=0)
    ordered = mx.sort(left, axis=-1).view(mx.float32)[:, ::-1]
    if by_rank:
        return mx.take_along_axis(ordered, (goal - above).astype(mx.int32) - 1, axis=-1)
    return _first(ordered, above, goal)


def bisect(weights: mx.array, goal: mx.array, *, by_rank: bool) -> mx.array:
    """The smallest number above which the weights' sum (`by_rank`: their number) is below the goal, [F, V] and [F, 1]
    → [F, 1]. The same weights are at least this large as are at least what `descend` finds. Reads the weights 30
    times."""
    bits = weights.view(mx.int32)
    low = mx.zeros(goal.shape, dtype=mx.int32)
    high = mx.full(goal.shape, ONE_BITS, dtype=mx.int32)
    for _ in range(ONE_BITS.bit_length()):
        middle = (low + high) >> 1
        more = bits > middle
        sums = (
            mx.sum(more, axis=-1, keepdims=True).astype(mx.float32) if by_rank else _sum(mx.where(more, weights, 0.0))
        )
        below = sums < goal
        low, high = mx.where(below, low, middle + 1), mx.where(below, middle, high)
    return high.view(mx.float32)
