"""How long rows went from one token to the next: every gap is counted, stalls included."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

from rollout_server.engine.batch.row import Row
from rollout_server.engine.messages.status import GAP_BOUNDS, TokenGaps


class TokenGapCounter:
    """`clock` in seconds. A step of the rows of the step before costs one comparison of two lists: only where rows
    join, end or change their batch is each of them asked when it had its last token."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts = [0] * (len(GAP_BOUNDS) + 1)
        self._seconds = 0.0
        self._rows: list[Row] = []
        """Those of the last step, of which `told_at` is older than it was."""
        self._told_at = 0.0

    @property
    def gaps(self) -> TokenGaps:
        """Those since the start."""
        return TokenGaps(tuple(self._counts), self._seconds)

    def told(self, rows: Sequence[Row]) -> None:
        """Rows that were read: each has a new token, or an error. There is no gap before a row's first token."""
        now = self._clock()
        if rows == self._rows:
            self._add(now - self._told_at, len(rows))
        else:
            self.note()
            for row in rows:
                if row.told_at:
                    self._add(now - row.told_at, 1)
            self._rows = [*rows]
        self._told_at = now

    def note(self) -> None:
        """Leaves with the rows when they had their last token, and lets go of them."""
        for row in self._rows:
            row.told_at = self._told_at
        self._rows = []

    def _add(self, seconds: float, count: int) -> None:
        self._counts[bisect_left(GAP_BOUNDS, seconds)] += count
        self._seconds += count * seconds
