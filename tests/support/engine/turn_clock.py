"""A clock that tests hold: turns of a budget whose steps and readings take what a test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scheduling.turn_costs import Kind

Cost = Callable[[int], float]
"""Seconds of a forward that reads so many tokens, or of a step of so many rows."""


def linear(seconds: float, fixed: float = 0.0) -> Cost:
    return lambda tokens: fixed + tokens * seconds


@dataclass
class TurnClock:
    now: float = 0.0
    beside: float = 0.0
    """Seconds that a turn which reads takes beside the reading and the step."""

    def __call__(self) -> float:
        return self.now

    def turn(
        self,
        budget: TurnBudget,
        step: float,
        cost: Cost,
        *wanting: Kind,
        rows: int = 8,
        joining: int = 0,
        streamed: bool = False,
        whole: bool = True,
    ) -> dict[Kind, int]:
        """One turn whose step takes so long, and reading n tokens cost(n); what each kind read. `whole` as in
        `TurnBudget.end`."""
        budget.begin(rows=rows, joining=joining, streamed=streamed)
        budget.divide(wanting, joining)
        read: dict[Kind, int] = {}
        for kind in wanting:
            if share := budget.share(kind):
                budget.measure(kind, lambda kind=kind, share=share: self._read(read, kind, share, cost))  # type: ignore[misc]
        self.now += self.beside if read else 0.0
        if budget.steps(rows=rows, joining=joining):
            self.now += step
        budget.end(whole=whole)
        return read

    def _read(self, read: dict[Kind, int], kind: Kind, share: int, cost: Cost) -> int:
        self.now += cost(share)
        read[kind] = share
        return share

    def turns(
        self, budget: TurnBudget, step: float, cost: Cost, *wanting: Kind, count: int = 80
    ) -> list[tuple[int, float]]:
        """Tokens read in each of so many turns, and how long it took."""
        found = []
        for _ in range(count):
            began = self.now
            read = self.turn(budget, step, cost, *wanting)
            found.append((sum(read.values()), self.now - began))
        return found


@dataclass
class Joining:
    """Rows of one prompt, of which `left` tokens are unread."""

    left: int
    rows: int
    tokens: int


@dataclass
class Jobs:
    """What an engine of `places` rows would do with prompts, turn by turn. A group is (prompt tokens, rows, tokens of
    each row); `step` is what rows take, `cost` what reading does. `scoring` tokens are read beside."""

    budget: TurnBudget
    clock: TurnClock
    places: int
    step: Cost
    cost: Cost
    waiting: list[tuple[int, int, int]]
    scoring: int = 0
    reads: Kind = "scoring"
    """What these tokens are for."""
    streamed: bool = False
    rows: list[int] = field(default_factory=list)
    """Tokens that each running row still wants."""
    joining: list[Joining] = field(default_factory=list)
    steps: int = 0
    longest: float = 0.0
    """Seconds between two steps of rows that ran, at most."""
    _stepped_at: float = 0.0

    @property
    def _joining(self) -> int:
        return sum(joining.rows for joining in self.joining)

    def turn(self) -> None:
        free = self.places - len(self.rows) - self._joining
        idle = min(free, sum(rows for _, rows, _ in self.waiting))
        if not self.rows:
            self._stepped_at = self.clock.now
        self.budget.begin(rows=len(self.rows), joining=self._joining, idle=idle, streamed=self.streamed)
        if self.budget.admits():
            self._admit(free)
        wanting: list[Kind] = ["prefill"] * bool(self.joining)
        self.budget.divide([*wanting, *[self.reads] * bool(self.scoring)], self._joining)
        if share := self.budget.share("prefill"):
            self.budget.measure("prefill", lambda: self._prefill(share))
        if share := self.budget.share(self.reads):
            self.budget.measure(self.reads, lambda: self._score(share))
        if self.rows and self.budget.steps(rows=len(self.rows), joining=self._joining):
            self._step()
        self.budget.end()

    def run(self, turns: int = 100_000) -> float:
        """Turns until nothing is left; seconds."""
        began = self.clock.now
        for _ in range(turns):
            if not (self.waiting or self.joining or self.rows or self.scoring):
                return self.clock.now - began
            self.turn()
        raise AssertionError(f"Not over in {turns} turns.")

    def _admit(self, free: int) -> None:
        while self.waiting and free > 0:
            prompt, rows, tokens = self.waiting.pop(0)
            fits = min(rows, free)
            self.joining.append(Joining(prompt, fits, tokens))
            free -= fits
            if fits < rows:
                # Those that follow copy the prompt from their siblings.
                self.waiting.insert(0, (0, rows - fits, tokens))

    def _prefill(self, share: int) -> int:
        read = 0
        for joining in self.joining:
            count = min(joining.left, share - read)
            joining.left -= count
            read += count
        self.clock.now += self.cost(read) if read else 0.0
        for joining in [joining for joining in self.joining if not joining.left]:
            self.rows += [joining.tokens] * joining.rows
            self.joining.remove(joining)
        return read

    def _score(self, share: int) -> int:
        read = min(share, self.scoring)
        self.scoring -= read
        self.clock.now += self.cost(read)
        return read

    def _step(self) -> None:
        self.clock.now += self.step(len(self.rows))
        self.rows = [left - 1 for left in self.rows if left > 1]
        self.steps += 1
        self.longest = max(self.longest, self.clock.now - self._stepped_at)
        self._stepped_at = self.clock.now
