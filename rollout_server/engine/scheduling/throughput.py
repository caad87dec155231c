"""Throughput first: what a turn reads so that all rows are done soonest, whichever of them waits.

Reading and decoding share one device, so their order changes the sum in two ways only, and the costs decide both. A
pass over the weights costs the same for one token as for many: prompts are read in chunks of which it is a small part,
and a place that falls free waits for others, until what stands idle has lost as much as one pass costs. And a step
costs nearly the same for few rows as for all: rows that are ready wait for those that are being read. Where only few
are, or sequences are scored, which no row waits for, the order matters little, and rows have as much time as reading.
Rewards of calls have less: whoever asked for them waits for the calls' other rows, and these come first.

Why prompts and rows share no forward stands in docs/decisions/09-throughput-first.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rollout_server.engine.scheduling.turn_costs import Kind, Load, Reading, ReadingCosts

FIXED_SHARE = 0.05
"""The pass over the weights, of what a chunk costs, at most."""
FEW = 1 / 32
"""Share of all rows: where no more are being read, the others go on meanwhile."""
STEP_EVERY = 8
"""Chunks that are read between two steps of rows that wait, at most."""
REWARDS_SHARE = 0.125
"""Share of the time while rows decode that rewards may take."""
LEAST = 64
"""Tokens of a chunk, at least: the host has work for each one too."""
MOST_WAITED_S = 2.0
"""The longest that a free place waits to be filled together with others. It waits no longer either than until the pass
over the weights is `FIXED_SHARE` of that time."""
STALL = 2.0
"""A reading counts at most this many times its expected cost: rows are owed nothing for a stall."""


class ThroughputFirst:
    """A rule of `TurnBudget`. `costs` is what it has learnt of each kind, `most` the tokens of a turn."""

    def __init__(self, costs: Mapping[Kind, ReadingCosts], most: int) -> None:
        self._costs = costs
        self._most = most
        self._open = False
        """Rows join, and go on joining until none is left that is being read."""
        self._lost = self._waited = 0.0
        """Seconds of steps since rows could last join: those that went to idle places, and all."""
        self._owed = 0.0
        """Seconds by which rows are behind reading, where both have as much."""
        self._rewards_ahead = 0.0
        """Seconds that rows decode before rewards are read again."""
        self._unstepped = 0
        self._served: Kind | None = None

    def admits(self, load: Load) -> bool:
        """Returns whether rows may join."""
        once = self._costs["prefill"].fixed
        if not load.rows or self._lost >= once or self._waited >= min(once / FIXED_SHARE, MOST_WAITED_S):
            self._open, self._lost, self._waited = True, 0.0, 0.0
        elif not load.joining:
            self._open = False
        return self._open

    def divide(self, load: Load, wanting: Collection[Kind]) -> dict[Kind, int]:
        """Tokens that each kind may read in this turn, of those that have something to read."""
        if not load.rows:
            self._owed = self._rewards_ahead = 0.0
            return {kind: max(1, min(self._chunk(kind), self._most // len(wanting))) for kind in wanting}
        wanting = [kind for kind in wanting if kind != "rewards" or self._rewards_ahead <= 0.0]
        if not wanting or (self._owed > 0.0 and not ("prefill" in wanting and _waited_for(load))):
            return {}
        first = sorted(set(wanting) - {self._served}) if len(wanting) > 1 else list(wanting)
        self._served = first[0]
        return {self._served: self._chunk(self._served)}

    def _chunk(self, kind: Kind) -> int:
        """The most there is while the two parts of the cost cannot be told apart."""
        filling = self._costs[kind].filling(FIXED_SHARE)
        return min(self._most, max(LEAST, int(filling))) if 0.0 < filling < self._most else self._most

    def steps(self, load: Load, reading: Reading | None) -> bool:
        """Returns whether rows step now that the turn has read."""
        if reading and reading.tokens and _waited_for(load) and self._unstepped + 1 < STEP_EVERY:
            self._unstepped += 1
            return False
        self._unstepped = 0
        return True

    def end(self, load: Load, reading: Reading | None, seconds: float) -> None:
        """A turn in which rows decode took so long."""
        decoding = seconds if reading is None else load.usual or 0.0
        self._rewards_ahead = max(0.0, self._rewards_ahead - decoding)
        if reading is None:
            self._owed = max(0.0, self._owed - seconds)
            if load.idle:
                self._lost += seconds * load.idle / (load.rows + load.idle)
                self._waited += seconds
            return
        took = min(reading.seconds, STALL * self._costs[reading.kind].of(reading.tokens))
        if reading.kind == "rewards":
            self._rewards_ahead += took * (1.0 / REWARDS_SHARE - 1.0)
        elif reading.kind == "scoring" or not _waited_for(load):
            self._owed += max(0.0, took - (load.usual or 0.0))


def _waited_for(load: Load) -> bool:
    """Returns whether so many are being read that the others wait for them."""
    return load.joining > FEW * (load.rows + load.joining)
