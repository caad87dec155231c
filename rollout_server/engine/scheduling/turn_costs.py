"""What turns cost on this device, as they are measured: reading so many tokens, and a turn that only decodes.

A forward that reads costs two terms: a pass over the weights, whatever it reads, and so much for each token.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Literal

from rollout_server.engine.kv_cache.sizes import ROW_BUCKETS, padded, row_bucket

Kind = Literal["prefill", "scoring", "rewards", "pictures"]
"""What is read: prompts of rows, sequences that somebody waits for, or rows of calls whose other rows still run; and
pictures among them, by the tower."""
RECENT = 48
"""Readings that are remembered."""
OF_A_SIZE = 5
"""Measurements of one size; their median counts, so that one stall does not."""
DOUBTED = 4.0
"""A forward that costs this many times what was expected may be the first of its shape, or a stall. It is ignored until
`BELIEVED` in a row agree."""
BELIEVED = 3
UNDISTURBED, COUNTS = 9, 1
"""Turns of so many rows that are remembered, and which of them counts, in the order of their length: much makes one
longer, such as other processes, and a turn with a whole step in it is hardly ever shorter."""
DEARER = 1.1
"""A turn that only decodes may take so many times as long between turns that read, which leave other things in the
caches."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a turn finds: `rows` decode, and a turn of theirs that reads nothing takes `usual` seconds, None before
    there was one. `joining` rows wait for their prompt to be read, `idle` more could join at once."""

    rows: int
    usual: float | None = None
    joining: int = 0
    idle: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """One turn's reading: of at most `share` tokens so many were read, in so many seconds."""

    kind: Kind
    share: int
    tokens: int
    seconds: float


class ReadingCosts:
    """Seconds of a forward that reads n tokens: `fixed` + n × `per_token`, by least squares over the recent ones and
    those of the start, as dear as the recent ones have become: readings of about one size, which is what full chunks
    are, cannot tell the terms apart. Both are 0 until something was read."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._doubted: list[tuple[int, float]] = []
        self._first: list[tuple[int, float]] = []
        self.fixed = self.per_token = 0.0

    @property
    def known(self) -> bool:
        return bool(self._recent or self._first)

    def of(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens

    def within(self, seconds: float) -> float:
        """Tokens that are read in so many seconds; at least 0, endless where a token costs nothing."""
        left = max(0.0, seconds - self.fixed)
        return left / self.per_token if self.per_token else inf if left else 0.0

    def filling(self, share: float) -> float:
        """The fewest tokens of which the fixed part is at most this share of the cost; 0 without a fixed part."""
        if not self.fixed:
            return 0.0
        return self.fixed * (1 / share - 1) / self.per_token if self.per_token else inf

    def begin(self, readings: Iterable[tuple[int, float]]) -> None:
        """What was measured at the start, (tokens, seconds) of several lengths."""
        self._first = [(tokens, seconds) for tokens, seconds in readings if tokens > 0 and seconds > 0]
        if self.known:
            self._fit()

    def learn(self, tokens: int, seconds: float) -> None:
        """A forward read so many tokens, in so many seconds."""
        if tokens < 1 or seconds <= 0:
            return
        if self.known and seconds > DOUBTED * self.of(tokens):
            self._doubted.append((tokens, seconds))
            if len(self._doubted) < BELIEVED:
                return
            # What was known holds no longer.
            self._recent.clear()
            self._recent.extend(self._doubted)
        else:
            self._recent.append((tokens, seconds))
        self._doubted.clear()
        self._fit()

    def _fit(self) -> None:
        sizes: dict[int, deque[tuple[int, float]]] = {}
        for reading in self._recent:
            sizes.setdefault(padded(reading[0]), deque(maxlen=OF_A_SIZE)).append(reading)
        # Both numbers of one reading: a median of each would be on no line.
        points = [
            sorted(readings, key=lambda reading: reading[1])[(len(readings) - 1) // 2] for readings in sizes.values()
        ]
        line = _line(points + self._first_as_now())
        if line is None:
            # Of one size only: nothing tells the terms apart, so that both have changed alike, as far as is known.
            tokens, seconds = points[0] if points else self._first[0]
            before = self.of(tokens)
            line = (
                (self.fixed * seconds / before, self.per_token * seconds / before)
                if before
                else (0.0, seconds / tokens)
            )
        self.fixed, self.per_token = line

    def _first_as_now(self) -> list[tuple[int, float]]:
        line = _line(self._first) if self._first else None
        if line is None or not self._recent:
            return self._first
        dearer = statistics.median(seconds / (line[0] + line[1] * tokens) for tokens, seconds in self._recent)
        return [(tokens, seconds * dearer) for tokens, seconds in self._first]


def _line(points: list[tuple[int, float]]) -> tuple[float, float] | None:
    """(intercept, slope) that come nearest to the points, relative to how much each costs; neither is negative. None
    where all have one size."""
    weights = [1 / max(y, 1e-9) ** 2 for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    if spread <= 1e-9 * total * x_mean**2:
        return None
    together = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True))
    slope = together / spread
    if slope < 0:
        return y_mean, 0.0
    if y_mean < slope * x_mean:
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        return 0.0, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares
    return y_mean - slope * x_mean, slope


class UndisturbedTurns:
    """Seconds of turns that only decode, by their rows, since more of them take longer."""

    def __init__(self) -> None:
        self._quiet: dict[int, deque[float]] = {}
        self._between: dict[int, deque[float]] = {}
        """Since the last quiet one of as many rows."""

    def learn(self, rows: int, seconds: float, *, quiet: bool) -> None:
        """`quiet`: nothing waited to be read."""
        bucket = row_bucket(rows, ROW_BUCKETS[-1])
        if quiet:
            self._between.pop(bucket, None)
        turns = self._quiet if quiet else self._between
        turns.setdefault(bucket, deque(maxlen=UNDISTURBED)).append(seconds)

    def of(self, rows: int) -> float | None:
        """What as many rows take, or else fewer, who seldom take longer; None before there was a turn of either. Quiet
        turns say it for as long as those since then agree: rows grow, and others come in their place."""
        bucket = row_bucket(rows, ROW_BUCKETS[-1])
        known = max((each for each in {*self._quiet, *self._between} if each <= bucket), default=None)
        if known is None:
            return None
        found = [_counting(turns[known]) for turns in (self._quiet, self._between) if known in turns]
        return found[0] if len(found) == 1 else min(found[1], max(found[0], found[1] / DEARER))


def _counting(turns: Iterable[float]) -> float:
    ordered = sorted(turns)
    return ordered[min(COUNTS, (len(ordered) - 1) // 2)]
