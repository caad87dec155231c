"""What a turn reads besides decoding: rows that join or come back, and sequences that are scored, under one budget."""

from __future__ import annotations

from rollout_server.engine.batches import Batches
from rollout_server.engine.budget import Kind, TurnBudget
from rollout_server.engine.reports import Reports
from rollout_server.engine.scoring_queue import ScoringQueue
from rollout_server.engine.switching import Switching


class Reading:
    def __init__(
        self, batches: Batches, scoring: ScoringQueue, switching: Switching, reports: Reports, budget: TurnBudget
    ) -> None:
        self._batches = batches
        self._scoring = scoring
        self._switching = switching
        self._reports = reports
        self._budget = budget

    def divide(self) -> None:
        """Once a turn, when it is known who joins."""
        wanting: list[Kind] = []
        if self._batches.reading:
            wanting.append("prefill")
        if self._scoring.busy:
            wanting.append("scoring")
        self._budget.divide(wanting)

    @property
    def prefills(self) -> bool:
        """Whether this turn does something to groups that join: only then the step in flight must be read first."""
        cancelled = any(joining.group.cancelled for joining in self._batches.joining)
        return cancelled or (self._batches.reading and self._budget.share("prefill") > 0)

    def prefill(self) -> None:
        """No step may be in flight."""
        if self._batches.reading and self._budget.share("prefill"):
            self._budget.measure("prefill", self._prefill)

    def score(self, crowded: bool) -> None:
        """`crowded`: rows wait for KV memory."""
        share = self._budget.share("scoring")
        if share:
            self._budget.measure("scoring", lambda: self._scoring.advance(share, crowded))

    def _prefill(self) -> int:
        before = self._batches.fed
        for row in self._batches.prefill(self._budget.share("prefill")):
            # The alias may have moved while its prompt was read, or while it was away.
            self._reports.let_go(row)
            self._switching.follow(row)
        return self._batches.fed - before
