"""How many tokens a turn may read beside its decode step: prompts, and what is scored, draw from one budget.

While rows decode, a turn that reads may take twice as long as one that reads nothing, so that their tokens come at
least half as fast as undisturbed; when both kinds have something to read they do so in turn. Every forward is a pass
over the weights, for a few tokens nearly as long as for many: where no chunk worth a pass fits into a turn, a larger
one is read in one turn and nothing in the next ones. When nothing decodes, all of `most` is theirs.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Literal

from rollout_server.engine.kv_cache.sizes import row_bucket

Kind = Literal["prefill", "scoring"]
FIRST, DECENT, LEAST = 32, 24, 8
"""Tokens: where the search begins, what is worth a pass over the weights, and what a turn that reads reads at least."""
EVERY_TURN, SELDOM = 0.9, 1.25
"""Target cost of prefill or scoring, in turns that only decode: where it runs in every turn, and where turns are
skipped to pay for it."""
MOST_OWED = 4
"""The most turns that are skipped for one reading. A stall adds many, and says nothing of the next reading."""
LOOK_EVERY, FIRST_LOOK = 8, 2
"""How many turns read between two that only decode, which show what a turn costs undisturbed; and before the first."""
UNDISTURBED = 5
"""How many undisturbed turns are remembered; their median counts."""


class TurnBudget:
    """`clock` gives seconds. `round_down` takes a number of tokens to one that the device has planned for."""

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        round_down: Callable[[int], int] = lambda tokens: tokens,
    ) -> None:
        self._most = most
        self._least, self._first, self._decent = (min(tokens, most) for tokens in (LEAST, FIRST, DECENT))
        self._clock = clock
        self._round_down = round_down
        self._chunks: dict[Kind, float] = {}
        self._seldom: set[Kind] = set()
        """Kinds of which nothing decent fits into one turn."""
        self._tried: dict[Kind, int] = {}
        """How often that was found since rows began to decode: each time it takes larger chunks to try again."""
        self._undisturbed: dict[int, deque[float]] = {}
        """By rows, since more of them take longer."""
        self._rows = 0
        self._latest = 0
        self._decoding = False
        self._wanting: frozenset[Kind] = frozenset()
        self._served: Kind | None = None
        self._owed = 0.0
        """Turns to leave out."""
        self._since = 0
        self._began = 0.0
        self._read: tuple[Kind, int, int] | None = None
        """In this turn: what, of how many tokens at most, how many."""
        self.tokens = 0
        """Read since it was made."""

    def begin(self, *, decoding: bool, rows: int = 1) -> None:
        """A turn begins, in which `rows` rows decode or none does."""
        self._decoding, self._rows = decoding, row_bucket(rows, rows)
        self._began, self._read = self._clock(), None

    def divide(self, wanting: Collection[Kind]) -> None:
        """Decides who may read in this turn, of those who have something to read."""
        self._wanting = frozenset(wanting)
        if not self._decoding:
            self._owed = 0.0
            self._tried.clear()
        elif self._wanting and self._leaves_out():
            self._wanting = frozenset()
        elif len(self._wanting) > 1:
            self._wanting = frozenset(sorted(self._wanting - {self._served})[:1])
        self._served = min(self._wanting, default=self._served)

    def _leaves_out(self) -> bool:
        if self._owed >= 1.0:
            self._owed -= 1.0
            return True
        usual = self._usual
        return usual != 0 and self._since >= (FIRST_LOOK if usual is None else LOOK_EVERY)

    @property
    def _usual(self) -> float | None:
        """Seconds of an undisturbed turn; None before there was one."""
        turns = self._undisturbed.get(self._rows) or self._undisturbed.get(self._latest)
        return statistics.median(turns) if turns else None

    def share(self, kind: Kind) -> int:
        """Tokens that `kind` may read in this turn."""
        if kind not in self._wanting:
            return 0
        if not self._decoding:
            return max(1, self._most // len(self._wanting))
        return max(1, min(self._most, self._round_down(int(self._chunk(kind)))))

    def measure(self, kind: Kind, read: Callable[[], int]) -> None:
        """Runs `read`, which returns how many tokens it read; what that costs is seen at the end of the turn."""
        share = self.share(kind)
        self._read = (kind, share, 0)
        tokens = read()
        self._read = (kind, share, tokens)
        self.tokens += tokens

    def end(self) -> None:
        """The turn is over."""
        if not self._decoding:
            return
        seconds = self._clock() - self._began
        if self._read is None:
            self._undisturbed.setdefault(self._rows, deque(maxlen=UNDISTURBED)).append(seconds)
            self._latest, self._since = self._rows, 0
            return
        self._since += 1
        usual = self._usual
        if usual:
            self._learn(*self._read, max(0.0, seconds / usual - 1.0))

    def _learn(self, kind: Kind, share: int, tokens: int, added: float) -> None:
        """`added` is in undisturbed turns."""
        if added > 1.0 or kind in self._seldom:
            self._owed += min(added, MOST_OWED)
        # A few tokens say little of how long many take.
        if not tokens or 2 * tokens < share:
            return
        goal = SELDOM if kind in self._seldom else EVERY_TURN
        ratio = goal * tokens / (added * share) if added else 2.0
        chunk = self._chunk(kind) * min(2.0, max(0.5, ratio)) ** 0.5
        tried = self._tried.get(kind, 0)
        if chunk < self._decent and kind not in self._seldom:
            self._seldom.add(kind)
            self._tried[kind] = tried + 1
        elif chunk > 2 * self._decent << tried:
            self._seldom.discard(kind)
        self._chunks[kind] = min(float(self._most), max(float(self._least), chunk))

    def _chunk(self, kind: Kind) -> float:
        return self._chunks.get(kind, float(self._first))
