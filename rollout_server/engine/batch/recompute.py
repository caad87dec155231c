"""Rows whose KV was dropped for want of memory read their tokens again, each under the version it was read first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.placement import Placement
from rollout_server.engine.batch.row import Row
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.store import KVStore, Reading, Seating
from rollout_server.rollout import PolicyVersion

RecomputeRun = tuple[int, Placement, PolicyVersion]
"""Inputs up to this one (excluded) are read there, under that version: a placement may have been another one's."""


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    row: Row
    prompt: Prompt
    runs: tuple[RecomputeRun, ...]


class Recoveries:
    """Rows of one batch that are read again, oldest first. `route` aims the next forward at a placement of any
    parameter set."""

    def __init__(self, forward: Reading, store: KVStore, route: Callable[[Placement], None]) -> None:
        self._forward = forward
        self._store = store
        self._route = route
        self.open: list[Recovery] = []

    @property
    def unread(self) -> int:
        return sum(len(recovery.prompt.tokens) - recovery.prompt.prefilled for recovery in self.open)

    def begin(self, row: Row, runs: Sequence[RecomputeRun], columns: int) -> Prompt:
        """Reserves a place, and returns what is to be read; no step may be in flight, and no row may exceed
        `columns`."""
        tokens = (*row.group.request.prompt_ids, *row.token_ids)[: row.offset]
        prompt = Prompt(tokens, row.placement.slot, sight=row.group.sight)
        self._store.begin(prompt, 1, columns)
        self.open.append(Recovery(row, prompt, tuple(runs)))
        return prompt

    def prefill(self, budget: int) -> None:
        """Reads about `budget` tokens, of the oldest first."""
        for recovery in self.open:
            while budget > 0 and not recovery.prompt.done:
                prompt = recovery.prompt
                end, placement, _ = next(run for run in recovery.runs if run[0] > prompt.prefilled)
                count = prompt.chunk(min(end - prompt.prefilled, budget))
                prompt.slot = placement.slot
                self._store.prefill(self._forward, [(prompt, count)], lambda _, at=placement: self._route(at))  # type: ignore[misc]
                budget -= count

    def seat(self, seat: Callable[[int, Row], None]) -> None:
        """Rows that are complete, and their places, go to `seat`."""
        for recovery in [recovery for recovery in self.open if recovery.prompt.done]:
            # One after another: what a failure leaves unseated is still known to be open.
            seat(self._store.seat([Seating(recovery.prompt, 1)])[0][0], recovery.row)
            self.open.remove(recovery)

    def take(self, chosen: Callable[[Row], bool]) -> tuple[list[Row], list[int]]:
        """Rows that are to leave before they are complete, and the places that become free."""
        leaving = [recovery for recovery in self.open if chosen(recovery.row)]
        self.open = [recovery for recovery in self.open if not chosen(recovery.row)]
        places = [place for recovery in leaving for place in recovery.prompt.places]
        for recovery in leaving:
            self._store.cancel(recovery.prompt, 1)
        return [recovery.row for recovery in leaving], places

    def follow(self, moved: dict[int, int]) -> None:
        for recovery in self.open:
            recovery.prompt.places = [moved[place] for place in recovery.prompt.places]
