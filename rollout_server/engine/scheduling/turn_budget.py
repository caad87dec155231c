"""How many tokens a turn may read beside its decode step: prompts, and what is scored, draw from one budget.

Two rules divide it. Rows of which somebody reads the tokens as they come are kept going by `latency`; otherwise
`throughput` has all rows done soonest, unless the other is preferred. Both go by the same measured costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, get_args

from rollout_server.engine.messages.options import Prefer
from rollout_server.engine.scheduling.latency import LatencyFirst
from rollout_server.engine.scheduling.throughput import ThroughputFirst
from rollout_server.engine.scheduling.turn_costs import Kind, Load, Reading, ReadingCosts, UndisturbedTurns

if TYPE_CHECKING:
    from rollout_server.engine.sight.features import Ahead


class Rule(Protocol):
    """What a turn does; see `ThroughputFirst` and `LatencyFirst`."""

    def admits(self, load: Load) -> bool: ...

    def divide(self, load: Load, wanting: Collection[Kind]) -> dict[Kind, int]: ...

    def steps(self, load: Load, reading: Reading | None) -> bool: ...

    def end(self, load: Load, reading: Reading | None, seconds: float) -> None: ...


class TurnBudget:
    """`most` are the tokens of a turn, `clock` gives seconds. `round_down` takes a number of tokens to one that the
    device has planned for; None where it plans for none. `measure(most)` reads a few chunks of at most `most` tokens
    and says (tokens, seconds) of each."""

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        round_down: Callable[[int], int] | None = None,
        *,
        prefer: Prefer = "throughput",
        measure: Callable[[int], Iterable[tuple[int, float]]] = lambda most: (),
    ) -> None:
        self._most = most
        self._clock = clock
        self._round_down = round_down
        self._prefer = prefer
        self._measure = measure
        self._costs: dict[Kind, ReadingCosts] = {kind: ReadingCosts() for kind in get_args(Kind)}
        self._undisturbed = UndisturbedTurns()
        self._latency = LatencyFirst(self._costs, most)
        self._throughput = ThroughputFirst(self._costs, most)
        self._rule: Rule = self._throughput
        self._load = Load(0)
        self._shares: dict[Kind, int] = {}
        self._began = 0.0
        self._reading: Reading | None = None
        """What this turn reads, the last where nothing decodes and both kinds read."""
        self._wanted = self._stepped = False
        self.tokens = 0
        """Read since it was made."""

    def learn_costs(self) -> None:
        """Measures what reading costs, so that the first prompts are read in chunks that fit the device."""
        readings = list(self._measure(self._most))
        for kind, costs in self._costs.items():
            # What the tower costs the first picture says.
            costs.begin(() if kind == "pictures" else readings)

    def begin(self, *, rows: int, joining: int = 0, idle: int = 0, streamed: bool = False) -> None:
        """A turn begins, in which `rows` rows decode, some of them `streamed`: read as they come. `joining` rows wait
        for their prompt to be read, `idle` more could join."""
        self._rule = self._latency if streamed or self._prefer == "latency" else self._throughput
        self._load = Load(rows, self._undisturbed.of(rows), joining, idle)
        self._began, self._reading, self._shares = self._clock(), None, {}
        self._wanted = self._stepped = False

    def admits(self) -> bool:
        """Returns whether rows may join in this turn."""
        return self._rule.admits(self._load)

    def divide(self, wanting: Collection[Kind], joining: int = 0) -> None:
        """Decides who may read in this turn, of those who have something to read, now that it is known who joins."""
        self._load, self._wanted = replace(self._load, joining=joining), bool(wanting)
        self._shares = self._rule.divide(self._load, wanting)

    def share(self, kind: Kind) -> int:
        """Tokens that `kind` may read in this turn."""
        share = self._shares.get(kind, 0)
        if share and self._round_down is not None:
            share = max(1, self._round_down(share))
        return min(self._most, share)

    def look(self, look: Callable[[int | None], Ahead]) -> bool:
        """Runs `look`, which has the tower read at most so many pictures of what is read next; returns whether that is
        read in this turn. Where rows wait whose tokens are read as they come, one picture is the work of a turn, and
        owed as other reading is."""
        paced = self._rule is self._latency and self._load.rows > 0
        began = self._clock()
        ahead = look(1 if paced else None)
        if not ahead.pictures:
            return ahead.complete
        seconds = self._clock() - began
        self._costs["pictures"].learn(ahead.tokens, seconds)
        self._reading = Reading("pictures", ahead.tokens, ahead.tokens, seconds)
        return not paced

    def measure(self, kind: Kind, read: Callable[[], int]) -> None:
        """Runs `read`, which returns how many tokens it read."""
        began = self._clock()
        # What fails has read as well: the turn is no undisturbed one.
        self._reading = Reading(kind, self.share(kind), 0, 0.0)
        tokens = read()
        self._reading = Reading(kind, self.share(kind), tokens, self._clock() - began)
        self._costs[kind].learn(tokens, self._reading.seconds)
        self.tokens += tokens

    def steps(self, *, rows: int, joining: int) -> bool:
        """Returns whether rows step, now that the turn has read: `rows` are ready, `joining` are still being read."""
        self._stepped = self._rule.steps(replace(self._load, rows=rows, joining=joining), self._reading)
        return self._stepped

    def end(self, *, whole: bool = True) -> None:
        """The turn is over. `whole`: a step was in flight when it began, and one is now. Where the first was not there
        nothing was waited for, and where the last is not its time is in this turn too: neither says what a step takes.
        """
        if not self._load.rows:
            return
        seconds = self._clock() - self._began
        if self._reading is None and self._stepped and whole:
            self._undisturbed.learn(self._load.rows, seconds, quiet=not self._wanted)
        if self._load.usual is None:
            self._load = replace(self._load, usual=self._undisturbed.of(self._load.rows))
        self._rule.end(self._load, self._reading, seconds)
