"""Requests to an encoder, and which of their sequences share a forward: requests take turns, so that a small one does
not wait for a large one to end, and what is of the same width and runs on the same weights goes along."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapters.placement import Placement
from rollout_server.engine.messages.options import Activation
from rollout_server.engine.messages.scoring import Classified, Classify, Embed, Embedded
from rollout_server.engine.model.encoders.passages import Passage, width_of
from rollout_server.rollout import PolicyVersion


@dataclass(slots=True, eq=False)
class EncodingJob:
    """A request under the version that its policy meant when it came."""

    command: Classify | Embed
    version: PolicyVersion
    placement: Placement
    owner: str = ""
    """The request whose rows it scores; empty for one that asks for itself."""
    passages: tuple[Passage, ...] = ()
    found: dict[int, bytes] = field(default_factory=dict)
    """Little-endian float32 of each sequence that has been read."""
    ended: bool = False

    def __post_init__(self) -> None:
        types = self.command.types if isinstance(self.command, Classify) else ()
        every = types or ((),) * len(self.command.sequences)
        self.passages = tuple(map(Passage, self.command.sequences, every))

    @property
    def id(self) -> str:
        return self.command.id

    @property
    def complete(self) -> bool:
        return not self.unread

    @property
    def unread(self) -> int:
        """Sequences of it that were not read yet."""
        return len(self.passages) - len(self.found)

    def keep(self, index: int, values: NDArray[np.float32]) -> None:
        """What was read of a sequence: a vector, [labels], or [tokens, labels] of which positions are wanted."""
        if isinstance(self.command, Classify) and values.ndim == 2:
            values = values[list(self.command.positions[index])]
        self.found[index] = values.astype("<f4").tobytes()

    def reply(self, labels: tuple[str | None, ...], activation: Activation) -> Classified | Embedded:
        values = tuple(self.found[index] for index in range(len(self.passages)))
        if isinstance(self.command, Classify):
            return Classified(self.id, self.version, values, labels, activation)
        return Embedded(self.id, self.version, values)


Entry = tuple[EncodingJob, int]
"""A sequence that is to be read: its request, and its index there."""


@dataclass(frozen=True, slots=True, eq=False)
class ForwardGroup:
    """The sequences of one forward."""

    entries: tuple[Entry, ...]

    @property
    def passages(self) -> tuple[Passage, ...]:
        return tuple(job.passages[index] for job, index in self.entries)

    @property
    def placements(self) -> tuple[Placement, ...]:
        return tuple(job.placement for job, _ in self.entries)

    @property
    def jobs(self) -> tuple[EncodingJob, ...]:
        """Whose they are, each once."""
        return tuple(dict.fromkeys(job for job, _ in self.entries))


Bucket = tuple[int, int]
"""What sequences of one forward have in common: the parameter set, and the width to which they are padded."""


class EncodingQueue:
    """`budget` is how many tokens one forward reads at most, padding included, where more than one sequence is in it;
    `longest` is the widest that a sequence may be."""

    def __init__(self, budget: int, longest: int) -> None:
        self._budget = budget
        self._longest = longest
        self._open: dict[str, EncodingJob] = {}
        self._turns: dict[EncodingJob, set[Bucket]] = {}
        """Requests of which something is unread, and where; whose turn is next stands first."""
        self._unread: dict[Bucket, dict[EncodingJob, deque[int]]] = {}

    @property
    def jobs(self) -> tuple[EncodingJob, ...]:
        """Requests that are not answered, in the order in which they came."""
        return tuple(self._open.values())

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def add(self, job: EncodingJob) -> None:
        self._open[job.id] = job
        buckets = self._turns.setdefault(job, set())
        for index, passage in enumerate(job.passages):
            bucket = job.placement.parameters, self._width(passage)
            buckets.add(bucket)
            self._unread.setdefault(bucket, {}).setdefault(job, deque()).append(index)

    def _width(self, passage: Passage) -> int:
        return min(width_of(len(passage.ids)), self._longest)

    def take(self) -> ForwardGroup | None:
        """What the next forward reads: the widest of the request whose turn it is, and equal shares of whatever goes
        with them."""
        first = next(iter(self._turns), None)
        if first is None:
            return None
        bucket = max(self._turns[first], key=lambda bucket: bucket[1])
        # Its next turn comes after those of all others.
        self._turns[first] = self._turns.pop(first)
        unread, most, found = self._unread[bucket], max(1, self._budget // bucket[1]), list[Entry]()
        sharing = deque([first, *(job for job in unread if job is not first)])
        while sharing and len(found) < most:
            job = sharing.popleft()
            found.append((job, unread[job].popleft()))
            if unread[job]:
                sharing.append(job)
            else:
                self._drop(job, bucket)
        return ForwardGroup(tuple(found))

    def _drop(self, job: EncodingJob, bucket: Bucket) -> None:
        """Nothing of a request in this bucket is to be read any more."""
        unread, buckets = self._unread[bucket], self._turns[job]
        del unread[job]
        buckets.remove(bucket)
        if not unread:
            del self._unread[bucket]
        if not buckets:
            del self._turns[job]

    def close(self, job: EncodingJob) -> None:
        """It is answered: nothing more of it is read."""
        job.ended = True
        del self._open[job.id]
        for bucket in tuple(self._turns.get(job, ())):
            self._drop(job, bucket)

    def of(self, id: str) -> tuple[EncodingJob, ...]:
        """The request of this id, and those that read for it."""
        return tuple(job for job in self.jobs if id in (job.id, job.owner))
