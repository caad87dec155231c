"""Latency first: what a turn reads so that rows which somebody reads as they come get on at least half as fast.

A turn that reads takes at most about twice as long as one that reads nothing. Every forward is a pass over the weights,
for a few tokens nearly as long as for many: where no chunk worth a pass fits into a turn, a larger one is read in one
turn and nothing in the next ones. When nothing decodes, all of `most` is read.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Mapping

from rollout_server.engine.scheduling.turn_costs import Kind, Load, Reading, ReadingCosts

FIRST, LEAST = 32, 8
"""Tokens: what is read while nothing is known, and what a turn that reads reads at least."""
WORTH_A_PASS, HALF = 2 / 3, 1 / 2
"""The largest share of a reading's cost that the pass over the weights may be: where every turn reads, and where turns
are skipped for a reading that is longer than these allow, because already the pass is."""
EVERY_TURN, SELDOM = 0.9, 1.25
"""What a reading should cost, in turns that only decode: where every turn reads, and where turns are skipped for it.
For each that costs more than one, at least so many are skipped: fewer turns are long than are not, so that the median
is one that is not."""
LATEST, MOST_BESIDE = 9, 0.5
"""Readings of which the median says what such a turn costs beside what was expected, and the most that this is taken to
be, in turns that only decode: the next step is built while none runs, and caches hold other things."""
MOST_OWED = 4.0
"""The most turns that are skipped for one reading that is not known to cost more, as long as one takes what it was
taken to. A stall adds many, and says nothing of the next reading."""
LOOK_EVERY, FIRST_LOOK = 8, 2
"""How many turns read between two that only decode, which show what a turn costs undisturbed; and before the first."""


class LatencyFirst:
    """A rule of `TurnBudget`. `costs` is what it has learnt of each kind, `most` the tokens of a turn."""

    def __init__(self, costs: Mapping[Kind, ReadingCosts], most: int) -> None:
        self._costs = costs
        self._most = most
        self._owed, self._owed_seconds = 0.0, 0.0
        """Turns to leave out, and seconds of them. It is over with whichever is paid first: what a turn takes may have
        been learnt too short when they came to be owed, or too long."""
        self._beside: dict[Kind, deque[float]] = {kind: deque(maxlen=LATEST) for kind in costs}
        self._since = 0
        """Turns that read, since one only decoded."""
        self._served: Kind | None = None
        self._pays = False
        """Turns are skipped for what this one reads."""

    def admits(self, load: Load) -> bool:
        """Returns whether rows may join."""
        return True

    def divide(self, load: Load, wanting: Collection[Kind]) -> dict[Kind, int]:
        """Tokens that each kind may read in this turn, of those that have something to read."""
        if not load.rows:
            self._owed = self._owed_seconds = 0.0
            return {kind: max(1, self._most // len(wanting)) for kind in wanting}
        if not wanting or self._leaves_out(load):
            return {}
        first = sorted(set(wanting) - {self._served}) if len(wanting) > 1 else list(wanting)
        self._served = first[0]
        return {self._served: max(1, min(self._most, int(self._chunk(self._served, load.usual))))}

    def _leaves_out(self, load: Load) -> bool:
        if load.usual and self._owed >= 1.0 and self._owed_seconds >= load.usual:
            self._owed -= 1.0
            self._owed_seconds -= load.usual
            return True
        return load.usual != 0 and self._since >= (FIRST_LOOK if load.usual is None else LOOK_EVERY)

    def _chunk(self, kind: Kind, usual: float | None) -> float:
        costs, self._pays = self._costs[kind], False
        if not costs.known or not usual:
            return FIRST
        beside = statistics.median(self._beside[kind]) if self._beside[kind] else 0.0
        fits = costs.within((EVERY_TURN - min(max(0.0, beside), MOST_BESIDE)) * usual)
        if fits >= max(LEAST, costs.filling(WORTH_A_PASS)):
            return min(fits, self._most)
        self._pays = True
        least = costs.filling(HALF) if costs.fixed > SELDOM * usual else LEAST
        return min(self._most, max(least, costs.within(SELDOM * usual)))

    def steps(self, load: Load, reading: Reading | None) -> bool:
        """Returns whether rows step now that the turn has read."""
        return True

    def end(self, load: Load, reading: Reading | None, seconds: float) -> None:
        """A turn in which rows decode took so long."""
        if reading is None:
            self._since = 0
            return
        self._since += 1
        if not load.usual:
            return
        added = max(0.0, seconds / load.usual - 1.0)
        expected = 0.0
        if reading.tokens:
            expected = self._costs[reading.kind].of(reading.tokens) / load.usual
            self._beside[reading.kind].append(added - expected)
        owed = min(added, max(MOST_OWED, expected))
        if added > 1.0:
            self._owe(max(SELDOM, owed), load.usual)
        elif self._pays and reading.tokens:
            self._owe(owed, load.usual)

    def _owe(self, turns: float, usual: float) -> None:
        self._owed = min(self._owed, self._owed_seconds / usual) + turns
        self._owed_seconds = self._owed * usual
