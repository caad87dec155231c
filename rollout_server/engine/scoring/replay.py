"""A recorded row's tokens drawn once more: the positions of a row are the rows of one call of the one sampler, with the
row's own parameters, counts and uniforms. What comes out is compared with what was recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import mlx.core as mx
import numpy as np

from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.sampling.filters import RowSubset
from rollout_server.engine.sampling.grammars import MaskFiller, hold_back
from rollout_server.engine.sampling.logits_processors import Pairs, allowed_only, count_tokens, ends_of
from rollout_server.engine.sampling.margins import margins
from rollout_server.engine.sampling.numerics import FANOUT, MOST
from rollout_server.engine.sampling.sampler import SamplerArrays, prepare, sample, shape, uniforms
from rollout_server.grammar import Follower
from rollout_server.rollout import SamplingParams


@dataclass(slots=True, eq=False)
class RowReplay:
    """One row, and the first difference once it was met; nothing is drawn after it."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    judged: tuple[bool, ...]
    """False: a token that was given to the row."""
    sampling: SamplingParams
    seed: int
    eos: frozenset[int]
    difference: int | None = None
    """Index in `token_ids`."""
    margin: float | None = None
    """How little would have to be otherwise for the recorded token to come. Of a sampled row: the least distance by
    which its uniforms, of the blocks and of the token in the smallest, would have to move, at most, for them to fall
    where the recorded token lies. A filter's edge counts as well: where one token more or less had stayed, the larger
    of that distance and of how close the edge is (mass for top-p, nats for top-k and min-p); where the filters removed
    the recorded token among others, how far it is from the edge. Of a greedy row: the gap between its logit and the
    largest. None where it could not come at all."""

    follower: Follower | None = None
    """Where in the grammar, if there is one, the tokens up to the last masked position lead."""
    followed: int = 0

    def masks(self, positions: Sequence[int], vocabulary: int) -> np.ndarray:
        """What the grammar lets come at ascending positions, none before the last that was asked for; uint32
        [P, ⌈V/32⌉], see `grammars.MaskFiller`. Once a token was recorded that it does not let come, anything may."""
        if self.follower is None:
            self.follower = self.sampling.constraint.follow(()) if self.sampling.constraint is not None else None
        words = np.full((len(positions), (vocabulary + 31) // 32), 2**32 - 1, dtype=np.uint32)
        if self.follower is None:
            return words
        filler = MaskFiller(vocabulary)
        for mask, position in zip(words, positions, strict=True):
            for token in self.token_ids[self.followed : position]:
                self.follower.advance(token)
            self.followed = position
            if self.follower.fault is not None:
                break
            mask[:] = filler.fill([self.follower])[0]
            if position < self.sampling.min_tokens:
                hold_back(mask, ends_of(self.sampling, self.eos))
        return words

    def seen(self, positions: Sequence[int], vocabulary: int) -> np.ndarray:
        """What the penalties of each position count, int32 [P, V], as `step_inputs.TokenCounts` holds it."""
        counts = count_tokens(self.prompt_ids, self.token_ids[: positions[0]], vocabulary)
        rows = np.repeat(counts[None], len(positions), axis=0)
        for row in range(1, len(positions)):
            for token in self.token_ids[positions[row - 1] : positions[row]]:
                rows[row:, token] += 2
        return rows


@dataclass(frozen=True, slots=True, eq=False)
class TokenRange:
    """`count` tokens of a row from number `first` on; their logits begin at row `at`."""

    row: RowReplay
    at: int
    first: int
    count: int

    def within(self, start: int, end: int) -> TokenRange | None:
        """Its part in rows `start` to `end` of the logits, whose rows count from there."""
        first, last = max(self.at, start), min(self.at + self.count, end)
        if first >= last:
            return None
        return TokenRange(self.row, first - start, self.first + first - self.at, last - first)

    @property
    def positions(self) -> list[int]:
        """The tokens that are drawn again."""
        if self.row.difference is not None:
            return []
        return [index for index in range(self.first, self.first + self.count) if self.row.judged[index]]


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """What one call of the sampler is given."""

    arrays: SamplerArrays
    uniform: mx.array
    banned: Pairs | None
    seen: mx.array | None
    mask: RowSubset | None

    @classmethod
    def of(
        cls,
        work: Sequence[tuple[RowReplay, Sequence[int]]],
        vocabulary: int,
        kernel: FilterKernel | None,
        mask: RowSubset | None = None,
    ) -> _Inputs:
        """`mask` is what is known of the only row; else it is asked for."""
        params = [row.sampling for row, positions in work for _ in positions]
        every = [position for _, positions in work for position in positions]
        arrays = prepare(params, vocabulary, entropy=False, top_logprobs=0, eos=work[0][0].eos, kernel=kernel)
        counted = [row.seen(positions, vocabulary) for row, positions in work if row.sampling.penalised]
        return cls(
            arrays,
            mx.array(uniforms([row.seed for row, positions in work for _ in positions], every)),
            arrays.bans.at(every) if arrays.bans else None,
            mx.array(np.concatenate(counted)) if counted else None,
            mask or _mask(work, vocabulary),
        )

    def mask_of(self, index: int) -> RowSubset | None:
        """That of one row alone."""
        if self.mask is None:
            return None
        if self.mask.rows is None:
            return RowSubset(None, self.mask.values[index : index + 1])
        found = np.flatnonzero(np.array(self.mask.rows) == index)
        return RowSubset(None, self.mask.values[int(found[0])][None]) if len(found) else None


def _mask(work: Sequence[tuple[RowReplay, Sequence[int]]], vocabulary: int) -> RowSubset | None:
    """The masks of rows that have a grammar."""
    constrained = [row.sampling.constraint is not None for row, positions in work for _ in positions]
    if not any(constrained):
        return None
    words = [row.masks(positions, vocabulary) for row, positions in work if row.sampling.constraint is not None]
    rows = None if all(constrained) else mx.array(np.flatnonzero(constrained).astype(np.int32))
    return RowSubset(rows, mx.array(np.concatenate(words)))


def replay_tokens(logits: mx.array, token_ranges: Sequence[TokenRange], kernel: FilterKernel | None = None) -> None:
    """Draws the tokens of all stretches from float32 logits [N, V] and notes in each row its first difference.
    `kernel` filters, if it did when they were drawn first."""
    work = [(token_range, positions) for token_range in token_ranges if (positions := token_range.positions)]
    if not work:
        return
    places = [
        token_range.at + position - token_range.first for token_range, positions in work for position in positions
    ]
    theirs = logits if places == list(range(len(logits))) else mx.take(logits, mx.array(places), axis=0)
    inputs = _Inputs.of([(token_range.row, positions) for token_range, positions in work], logits.shape[-1], kernel)
    drawn = np.array(
        sample(theirs, inputs.arrays, inputs.uniform, inputs.banned, seen=inputs.seen, mask=inputs.mask).ids
    )
    recorded = np.array(
        [token_range.row.token_ids[position] for token_range, positions in work for position in positions]
    )
    owners = list(chain.from_iterable([(token_range, p) for p in positions] for token_range, positions in work))
    for index in np.flatnonzero(drawn != recorded):
        token_range, position = owners[index]
        row = token_range.row
        if row.difference is None:
            row.difference = position
            row.margin = _margin(theirs[int(index)][None], row, position, inputs.mask_of(int(index)))


def _margin(logits: mx.array, row: RowReplay, position: int, mask: RowSubset | None) -> float | None:
    """See `RowReplay.margin`; logits [1, V] of the position and what the grammar says of it."""
    token, sampling = row.token_ids[position], row.sampling
    inputs = _Inputs.of([(row, [position])], logits.shape[-1], None, mask)
    reshaped = shape(logits, inputs.arrays, inputs.seen, inputs.banned)
    shaped = np.array((reshaped if mask is None else allowed_only(reshaped, mask))[0], dtype=np.float64)
    short = float(shaped.max() - shaped[token])
    if not math.isfinite(short):
        return None
    if sampling.temperature == 0:
        return short
    weights = np.exp((shaped - shaped.max()) / sampling.temperature)
    uniform = np.array(inputs.uniform[0], dtype=np.float64)
    order = np.argsort(-weights, kind="stable")
    slack = margins(weights[order], sampling)
    count = max(1, int(np.argmax(slack < 0)) if (slack < 0).any() else len(slack))
    found = [_distance(np.isin(np.arange(len(weights)), order[:count]) * weights, uniform, token)]
    # Where a filter's edge lies so close, one token more or less may have stayed, or the next for the last.
    last, following = order[: count - 1], order[count : count + 1]
    for changed, edges in (
        (last, slack[count - 1 : count]),
        (order[: count + 1], slack[count : count + 1]),
        (np.concatenate([last, following]), slack[count - 1 : count + 1]),
    ):
        if len(changed):
            kept = np.isin(np.arange(len(weights)), changed) * weights
            found.append(max([_distance(kept, uniform, token), *np.abs(edges).tolist()]))
    nearest = min(found)
    if math.isfinite(nearest):
        return nearest
    return abs(float(slack[int(np.flatnonzero(order == token)[0])])) if weights[token] > 0 else None


def _distance(weights: np.ndarray, uniform: np.ndarray, token: int) -> float:
    """How far the uniforms would have to move for the draw to give this token of weights [V]: the largest distance over
    the levels; infinite where the token has no weight."""
    if weights[token] == 0:
        return math.inf
    levels = [weights]
    while len(levels[-1]) > MOST:
        levels.append(np.add.reduceat(levels[-1], np.arange(0, len(levels[-1]), FANOUT)))
    entries = [token // FANOUT**number for number in range(len(levels))]
    found = [_outside(uniform[0], levels.pop(), entries.pop())]
    for number, (level, entry) in enumerate(zip(levels[::-1], entries[::-1], strict=True), 1):
        block = entry // FANOUT * FANOUT
        found.append(_outside(uniform[number], level[block : block + FANOUT], entry - block))
    return max(found)


def _outside(uniform: float, weights: np.ndarray, chosen: int) -> float:
    """How far a uniform lies from the interval in which it would have chosen this one of the weights."""
    ends = np.cumsum(weights)
    low, high = (ends[chosen] - weights[chosen]) / ends[-1], ends[chosen] / ends[-1]
    return float(max(low - uniform, uniform - high, 0.0))
