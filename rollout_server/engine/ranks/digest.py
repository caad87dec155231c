"""What a turn did, as a few bytes: ranks that did the same have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from rollout_server.engine.messages.rollouts import Event, RowFinished
from rollout_server.engine.messages.status import EngineStatus

SIZE = 8
"""Bytes of a digest."""


class TurnDigest:
    """Collects what decides where an engine goes next: ids, ends of rows, answers and counts. Log-probabilities and
    times are not among it: they leave by rank 0 alone."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=SIZE)

    def saw_ids(self, ids: Sequence[int]) -> None:
        """The ids of a step, by place."""
        self._add("ids", list(ids))

    def saw_events(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, RowFinished):
                rollout = event.rollout
                self._add("row", event.id, list(rollout.token_ids), rollout.finish_reason)
            else:
                self._add(type(event).__name__, event.id)

    def saw_status(self, status: EngineStatus) -> None:
        self._add(status.state, status.steps, status.tokens, status.preemptions, status.running, status.waiting)

    def take(self) -> bytes:
        """The digest of what was seen since the last call."""
        taken, self._hash = self._hash.digest(), hashlib.blake2b(digest_size=SIZE)
        return taken

    def _add(self, *facts: object) -> None:
        self._hash.update(repr(facts).encode())
