"""How many tokens a turn may read beside its decode step: prompts, and what is scored, draw from one budget.

While rows decode, a turn reads for as long as their step takes, so that their tokens come at least half as fast as
undisturbed; when both kinds have something to read they do so in turn. When nothing decodes, all of `most` is theirs.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Literal

Kind = Literal["prefill", "scoring"]
FIRST, LEAST = 32, 8
"""Tokens: where the search begins, and what is always read, or nothing would get on."""
STEPS = 7
"""Decode steps whose median counts."""


class TurnBudget:
    """`clock` gives seconds. `round_down` takes a number of tokens to one that the device has planned for."""

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        round_down: Callable[[int], int] = lambda tokens: tokens,
    ) -> None:
        self._most = most
        self._least = min(LEAST, most)
        self._clock = clock
        self._round_down = round_down
        self._chunks: dict[Kind, float] = {}
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._decoding = False
        self._wanting: frozenset[Kind] = frozenset()
        self._served: Kind | None = None
        self._began = self._read = 0.0

    def begin(self, *, decoding: bool) -> None:
        """A turn begins, in which rows decode or do not."""
        self._decoding = decoding
        self._began, self._read = self._clock(), 0.0

    def divide(self, wanting: Collection[Kind]) -> None:
        """Decides who may read in this turn, of those who have something to read."""
        self._wanting = frozenset(wanting)
        if self._decoding and len(self._wanting) > 1:
            self._wanting -= {self._served}
            self._wanting = frozenset(sorted(self._wanting)[:1])
        self._served = min(self._wanting, default=self._served)

    def share(self, kind: Kind) -> int:
        """Tokens that `kind` may read in this turn."""
        if kind not in self._wanting:
            return 0
        if not self._decoding:
            return max(1, self._most // len(self._wanting))
        return max(1, min(self._most, self._round_down(int(self._chunk(kind)))))

    def measure(self, kind: Kind, read: Callable[[], int]) -> None:
        """Runs `read`, which returns how many tokens it read, and learns from how long that took."""
        share, began = self.share(kind), self._clock()
        tokens = read()
        seconds = self._clock() - began
        self._read += seconds
        # A few tokens say little of how long many take.
        if not self._decoding or 2 * tokens < share or not self._steps:
            return
        step = statistics.median(self._steps)
        if step > 0 and seconds > 0:
            ratio = step / (seconds * share / tokens)
            chunk = self._chunk(kind) * min(2.0, max(0.5, ratio)) ** 0.5
            self._chunks[kind] = min(float(self._most), max(float(self._least), chunk))

    def end(self) -> None:
        """The turn is over: what was not read was the step."""
        if self._decoding:
            self._steps.append(max(0.0, self._clock() - self._began - self._read))

    def _chunk(self, kind: Kind) -> float:
        return self._chunks.get(kind, float(min(FIRST, self._most)))
