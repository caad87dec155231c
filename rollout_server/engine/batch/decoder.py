"""Decode steps of one batch: the step in flight, and what the next one is computed and drawn with.

One step ahead: step k+1 is built while step k runs and dispatched as soon as k was read, or before that where steps
may overlap; what k returned is recorded while k+1 runs. A stop token is therefore seen one step late, and its extra
token is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from rollout_server.engine.batch.row import Row, TopTokens
from rollout_server.engine.batch.step_inputs import GrammarMasks, StepInputs, TokenCounts, inputs_of, prepare_rows
from rollout_server.engine.kv_cache.store import Forward, KVStore
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.sampling.filters import RowSubset
from rollout_server.engine.sampling.logits_processors import Pairs
from rollout_server.engine.sampling.sampler import Sampled, SamplerArrays, sample, uniforms
from rollout_server.engine.timeline import Timeline
from rollout_server.errors import NonFiniteLogits


@dataclass(frozen=True, slots=True, eq=False)
class PendingStep:
    """A step whose tokens are still to be drawn from its logits [R, V]."""

    number: int
    rows: tuple[tuple[int, Row], ...]
    logits: mx.array
    draws: mx.array
    banned: Pairs | None


@dataclass(frozen=True, slots=True, eq=False)
class DispatchedStep:
    """A step in flight: which row sits where, and its results, still on the device."""

    number: int
    rows: tuple[tuple[int, Row], ...]
    sampled: Sampled

    def read(self) -> StepResult:
        """Waits for the results and copies them to the host."""
        sampled = self.sampled
        ids = np.array(sampled.ids).tolist()
        values = np.array(sampled.values).T.tolist()
        top: list[TopTokens] = []
        if sampled.top_ids is not None and sampled.top_logprobs is not None:
            pairs = zip(np.array(sampled.top_ids).tolist(), np.array(sampled.top_logprobs).tolist(), strict=True)
            top = [tuple(zip(tokens, logs, strict=True)) for tokens, logs in pairs]
        return StepResult(self.rows, ids, values, top)


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """A step's results on the host, by place."""

    rows: tuple[tuple[int, Row], ...]
    ids: list[int]
    values: list[list[float]]
    top: list[TopTokens]

    def record(self, eos: frozenset[int]) -> list[Row]:
        """Gives every row that still runs its token; returns those rows, some of which end with it."""
        touched = []
        for place, row in self.rows:
            # Of a row that ended meanwhile too: whoever gets its place next reads what stands there.
            row.finite = math.isfinite(self.values[place][0]) and math.isfinite(self.values[place][1])
            if not row.running:
                continue
            if row.finite:
                row.record(self.ids[place], self.values[place], self.top[place] if self.top else None, eos)
            else:
                row.fail(
                    NonFiniteLogits(
                        f"The model produced NaN or infinity at token {len(row.token_ids)} of this row under "
                        f"{row.version}; the other rows are not affected."
                    )
                )
            touched.append(row)
        return touched


class Decoder:
    """Seats are rows by place; whoever changes them, or the number of places, calls `seats_changed`.

    `forward` computes the logits of one token of each of the first places, up to those that the last row needs, and
    `route(slots)` tells the adapter layers which slot each of them uses. `eos` are the model's end tokens. All `ranks`
    take the ids that rank 0 draws."""

    def __init__(
        self,
        forward: Forward,
        store: KVStore,
        route: Callable[[Sequence[int]], None],
        eos: frozenset[int],
        vocabulary: int,
        filter_kernel: FilterKernel | None = None,
        *,
        timeline: Timeline,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._forward = forward
        self._store = store
        self._route = route
        self._eos = eos
        self._vocabulary = vocabulary
        self._timeline = timeline
        self._filter_kernel = filter_kernel
        self._dispatched: DispatchedStep | None = None
        self._copies: list[mx.array] = []
        self._places = 0
        # Made again when rows come, go or move.
        self._arrays: SamplerArrays | None = None
        self._inputs: StepInputs | None = None
        self._counts = TokenCounts(vocabulary)
        self._masks = GrammarMasks(vocabulary, eos)
        self.steps = 0
        """Dispatched since it was made."""

    @property
    def in_flight(self) -> bool:
        return self._dispatched is not None

    def computes(self, row: Row) -> bool:
        """Returns whether the step in flight computes a row."""
        return self._dispatched is not None and row.last_step == self._dispatched.number

    def seats_changed(self) -> None:
        self._arrays = self._inputs = None

    def copy(self, copies: list[mx.array]) -> None:
        """Computes copies of KV: behind the step in flight, or at once without one. They are waited for with that step,
        since a KV array that one of them still reads would be copied whole by the next write."""
        if self._dispatched is None:
            mx.eval(copies)
        elif copies:
            mx.async_eval(copies)
            self._copies += [] if self._store.steps_overlap else copies

    def step(self, seats: Mapping[int, Row]) -> list[Row]:
        """Builds the next step, reads the one in flight and dispatches the next, before or after it was read; returns
        the rows that got a token."""
        with self._timeline.part("step") as part:
            with self._timeline.part("build"):
                pending = self._build(seats)
            if pending is not None and self._inputs is not None:
                part.note(rows=len(pending.rows), width=self._inputs.width, places=self._places)
                if self._inputs.masked:
                    return self._step_masked(pending)
            following = None if pending is None else self._draw(pending, None)
            flying, self._dispatched = self._dispatched, None
            overlaps = self._store.steps_overlap
            if overlaps:
                self._dispatch(following)
            result = self._wait(flying)
            if not overlaps:
                self._dispatch(following)
            return result.record(self._eos) if result else []

    def _dispatch(self, step: DispatchedStep | None) -> None:
        if step is not None:
            self._hand_over(step.sampled.arrays(), self._store.pending())
            self._dispatched = step

    def _hand_over(self, *arrays: Any) -> None:
        with self._timeline.part("hand over"):
            mx.async_eval(*arrays)

    def _step_masked(self, pending: PendingStep) -> list[Row]:
        """Masks need the tokens in flight, and the forward does not: it runs while they are computed."""
        result = self._read()
        self._hand_over(pending.logits, self._store.pending())
        touched = result.record(self._eos) if result else []
        mask, failed = self._masks.of(pending.rows, self._places)
        self._dispatched = self._draw(pending, mask)
        self._hand_over(self._dispatched.sampled.arrays())
        return touched + [row for row in failed if row not in touched]

    def settle(self) -> list[Row]:
        """Reads the step in flight without dispatching another; returns the rows that got a token."""
        result = self._read()
        return result.record(self._eos) if result else []

    def _build(self, seats: Mapping[int, Row]) -> PendingStep | None:
        rows = tuple([(place, row) for place, row in seats.items() if row.wants_step])
        if not rows:
            return None
        if self._arrays is None:
            # A prompt that is being read makes no step of those that run any wider.
            self._places = self._store.step_places(max(seats))
            self._arrays = self._prepare(seats, self._places)
        size = self._places
        if self._inputs is None or self._inputs.rows != rows:
            self._inputs = StepInputs(rows, size)
        inputs = self._inputs
        self._store.set_positions(inputs.offsets, inputs.width, inputs.deltas)
        self._route(inputs.slots())
        # With a step in flight rows leave, and none joins: it may have computed more places, and never fewer.
        ids = self._dispatched.sampled.ids[:size] if self._dispatched is not None else inputs_of(seats, size)
        logits = self._forward(ids[:, None], self._store.layers)[:, -1]
        draws = mx.array(uniforms(inputs.seeds, inputs.positions))
        bans = self._arrays.bans
        banned = bans.at(inputs.positions) if bans else None
        self.steps += 1
        inputs.advance(self.steps)
        return PendingStep(self.steps, rows, logits, draws, banned)

    def _draw(self, pending: PendingStep, mask: RowSubset | None) -> DispatchedStep:
        if self._arrays is None:
            raise RuntimeError("Rows changed between a step's forward and its draw.")
        sampled = sample(pending.logits, self._arrays, pending.draws, pending.banned, seen=self._counts.seen, mask=mask)
        if self._ranks is not None:
            sampled = replace(sampled, ids=self._ranks.agree(sampled.ids))
        self._counts.add(sampled.ids)
        return DispatchedStep(pending.number, pending.rows, sampled)

    def _prepare(self, seats: Mapping[int, Row], size: int) -> SamplerArrays:
        by_place = [seats.get(place) for place in range(size)]
        self._counts.seat(by_place)
        return prepare_rows(by_place, self._vocabulary, self._eos, self._filter_kernel)

    def _read(self) -> StepResult | None:
        """Waits for the step in flight and copies its results to the host."""
        dispatched, self._dispatched = self._dispatched, None
        return self._wait(dispatched)

    def _wait(self, dispatched: DispatchedStep | None) -> StepResult | None:
        if dispatched is None:
            return None
        with self._timeline.part("settle") as part:
            part.note(rows=len(dispatched.rows))
            copies, self._copies = self._copies, []
            if copies:
                mx.eval(copies)
            result = dispatched.read()
        if self._ranks is not None:
            self._ranks.digest.saw_ids(result.ids)
        return result
