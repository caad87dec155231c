"""The latest rollouts, kept as they are for whoever looks: so many of them, and so many bytes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from rollout_server.rollout import Rollout

MOST_ROLLOUTS = 32
MOST_BYTES = 16 * 2**20
FLOAT_BYTES = 32
"""A float in a tuple: the object and its place. Small whole numbers take less."""
STRIP = 48
"""Parts that a rollout's log-probabilities are drawn in, in a list."""


@dataclass(frozen=True)
class Kept:
    """A rollout as it left the engine, without what is large and never shown."""

    number: int
    """Counts the rollouts since the start."""
    request_id: str
    ended: float
    """Unix time, seconds."""
    rollout: Rollout

    @property
    def nbytes(self) -> int:
        rollout = self.rollout
        arrays = 5 + (rollout.entropy is not None) + (rollout.base_logprobs is not None)
        return FLOAT_BYTES * (len(rollout.prompt_ids) + arrays * len(rollout.token_ids))

    @cached_property
    def strip(self) -> tuple[float, ...]:
        """Means of the log-probabilities of at most `STRIP` runs of sampled tokens, in their order."""
        own = self.rollout.logprobs[len(self.rollout.prefix) :]
        ends = [len(own) * at // STRIP for at in range(STRIP + 1)] if len(own) > STRIP else list(range(len(own) + 1))
        return tuple(round(sum(own[start:end]) / (end - start), 3) for start, end in pairwise(ends))


class LatestRollouts:
    """A ring. What is cheap is all that is done when a rollout comes in: what is shown of it is made when it is."""

    def __init__(
        self, most: int = MOST_ROLLOUTS, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.time
    ) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._clock = clock
        self._kept: deque[Kept] = deque()
        self._nbytes = 0
        self._count = 0

    def __iter__(self) -> Iterator[Kept]:
        """The newest first."""
        return reversed(self._kept)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def find(self, number: int) -> Kept | None:
        return next((kept for kept in self._kept if kept.number == number), None)

    def add(self, request_id: str, rollout: Rollout) -> None:
        """Keeps a rollout; one that is larger than all room is counted, and nothing makes room for it."""
        self._count += 1
        if rollout.top_logprobs is not None or rollout.prompt_logprobs is not None:
            rollout = replace(rollout, top_logprobs=None, prompt_logprobs=None)
        kept = Kept(self._count, request_id, self._clock(), rollout)
        if kept.nbytes > self._most_bytes:
            return
        self._kept.append(kept)
        self._nbytes += kept.nbytes
        while len(self._kept) > self._most or self._nbytes > self._most_bytes:
            self._nbytes -= self._kept.popleft().nbytes
