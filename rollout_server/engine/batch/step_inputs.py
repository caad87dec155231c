"""What the rows of a decode step are computed and drawn with: positions, adapters, sampler arrays, counts and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from rollout_server.engine.batch.row import Row
from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.sampling.filters import RowSubset
from rollout_server.engine.sampling.grammars import MaskFiller, hold_back
from rollout_server.engine.sampling.logits_processors import count_tokens, ends_of
from rollout_server.engine.sampling.sampler import SamplerArrays, prepare
from rollout_server.errors import GrammarFault


class StepInputs:
    """Positions, seeds and slots of (place, row) `rows` among `size` places. The rows know all of it; as arrays it
    moves on without a loop over them. Places that take no part have seed and position 0."""

    def __init__(self, rows: Sequence[tuple[int, Row]], size: int) -> None:
        self.rows = tuple(rows)
        self.masked = any(row.follower is not None for _, row in rows)
        """True if any of them has a grammar."""
        self._places = np.array([place for place, _ in rows], dtype=np.int64)
        self._idle = sorted(set(range(size)) - {place for place, _ in rows})
        self.seeds = np.zeros(size, dtype=np.uint64)
        """uint64 [size]"""
        self.seeds[self._places] = np.array([row.seed for _, row in rows], dtype=np.uint64)
        self.positions = np.zeros(size, dtype=np.int64)
        """int64 [size], the index of the token that each row samples"""
        self.positions[self._places] = [row.dispatched for _, row in rows]
        self._columns = np.zeros(size, dtype=np.int64)
        self._columns[self._places] = [row.offset for _, row in rows]
        self._deltas: np.ndarray | None = None
        if any(row.delta for _, row in rows):
            self._deltas = np.zeros(size, dtype=np.int64)
            self._deltas[self._places] = [row.delta for _, row in rows]

    @property
    def deltas(self) -> list[int] | None:
        """What each place adds to its column for what turns queries and keys; None where no row has anything."""
        return None if self._deltas is None else self._deltas.tolist()

    @property
    def width(self) -> int:
        """Columns that the longest row reads."""
        return 1 + int(self._columns.max())

    @property
    def offsets(self) -> list[int | None]:
        """Column that each place writes; None where it takes no part."""
        found: list[int | None] = list(self._columns.tolist())
        for place in self._idle:
            found[place] = None
        return found

    def slots(self) -> list[int]:
        """Adapter slot of each place, as its row's version is now. Those that take no part use some row's, so that a
        batch on one version stays on the plain path."""
        found = [self.rows[0][1].placement.slot] * len(self.seeds)
        for place, row in self.rows:
            found[place] = row.placement.slot
        return found

    def advance(self, step: int) -> None:
        """`step` was dispatched: every row is one token further."""
        for _, row in self.rows:
            row.stamp()
            row.last_step = step
        self.positions[self._places] += 1
        self._columns[self._places] += 1


def inputs_of(seats: Mapping[int, Row], size: int) -> mx.array:
    """int32 [size]: the input of each place where no step in flight computes it."""
    ids = [0] * size
    for place, row in seats.items():
        ids[place] = row.input_id
    return mx.array(ids, dtype=mx.int32)


def prepare_rows(
    rows: Sequence[Row | None], vocabulary: int, eos: frozenset[int], kernel: FilterKernel | None
) -> SamplerArrays:
    """What the rows are sampled with, by place; at least one is there."""
    wants = [row.group.request.wants for row in rows if row is not None]
    return prepare(
        [None if row is None else row.group.request.sampling for row in rows],
        vocabulary,
        entropy=any(want.entropy for want in wants),
        top_logprobs=max(want.top_logprobs for want in wants),
        eos=eos,
        kernel=kernel,
    )


class TokenCounts:
    """How often each penalised row has sampled each token, and which are in its prompt; int32 [P, V] on the device.

    A row's first counts come from the host, so a row that starts with tokens (a prefix, or one that was preempted)
    counts them; from then on every step adds its own tokens without waiting for them. Nothing is held while no row is
    penalised."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._rows: list[tuple[Row, int]] = []
        """Each with the tokens it had before the first step that was counted here."""
        self._places: mx.array | None = None
        self._added = 0
        self.seen: mx.array | None = None
        """2 · times sampled + 1 if in the prompt."""

    def seat(self, rows: Sequence[Row | None]) -> None:
        """Which row sits at each place from the next step on. Rows that stay keep their counts."""
        chosen = [(place, row) for place, row in enumerate(rows) if row and row.group.request.sampling.penalised]
        if not chosen:
            self._rows, self._places, self.seen = [], None, None
            return
        # A row that sampled elsewhere meanwhile is counted anew.
        kept = {row: at for at, (row, before) in enumerate(self._rows) if before + self._added == row.dispatched}
        fresh = [row for _, row in chosen if row not in kept]
        parts = [] if self.seen is None else [self.seen]
        if fresh:
            parts.append(mx.array(np.stack([self._count(row) for row in fresh])))
        order = kept | {row: len(self._rows) + at for at, row in enumerate(fresh)}
        every = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        self.seen = mx.take(every, mx.array([order[row] for _, row in chosen], dtype=mx.int32), axis=0)
        self._rows = [(row, row.dispatched - self._added) for _, row in chosen]
        self._places = mx.array([place for place, _ in chosen], dtype=mx.int32)

    def add(self, ids: mx.array) -> None:
        """Counts a step's tokens, int32 [R] by place, on the device."""
        if self.seen is None or self._places is None:
            return
        self._added += 1
        self.seen = self.seen.at[mx.arange(len(self._rows)), mx.take(ids, self._places)].add(2)

    def _count(self, row: Row) -> np.ndarray:
        if row.running and len(row.token_ids) != row.dispatched:
            raise RuntimeError("A row's tokens are counted while one of them is still in flight.")
        return count_tokens(row.group.request.prompt_ids, row.token_ids, self._vocabulary)


class GrammarMasks:
    """`eos` are the model's end tokens."""

    def __init__(self, vocabulary: int, eos: frozenset[int]) -> None:
        self._filler = MaskFiller(vocabulary)
        self._eos = eos

    def of(self, rows: Sequence[tuple[int, Row]], size: int) -> tuple[RowSubset | None, list[Row]]:
        """Masks for the next token of these (place, row), all whose tokens have been recorded, among `size` places;
        and the rows that failed because their grammars cannot be followed any further."""
        chosen = sorted(
            ((place, row) for place, row in rows if row.running and row.follower is not None), key=lambda each: each[0]
        )
        followers = [row.follower for _, row in chosen if row.follower is not None]
        if not followers:
            return None, []
        words = self._filler.fill(followers)
        failed = []
        for mask, (_, row), follower in zip(words, chosen, followers, strict=True):
            sampling, index = row.group.request.sampling, len(row.token_ids)
            if follower.fault is not None:
                # Whatever it draws is thrown away.
                mask[:] = 2**32 - 1
                row.fail(GrammarFault(f"The grammar cannot be followed beyond token {index}: {follower.fault}."))
                failed.append(row)
            elif index < sampling.min_tokens:
                hold_back(mask, ends_of(sampling, self._eos))
        places = None if len(chosen) == size else mx.array([place for place, _ in chosen], dtype=mx.int32)
        return RowSubset(places, mx.array(words)), failed
