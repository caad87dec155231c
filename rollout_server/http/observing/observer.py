"""What is noted of rollouts that end, of pushes and of the engine's state as time goes by; all of it is bounded.

It belongs to the event loop. What a rollout costs here is a few sums over its tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from adapters.report import delta_norm
from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Publish, Published, RestoredVersion
from rollout_server.errors import RolloutError
from rollout_server.http.observing.latest_rollouts import LatestRollouts
from rollout_server.http.observing.row_metrics import RowMetrics
from rollout_server.http.observing.version_totals import VersionTable
from rollout_server.rollout import BASE, Rollout
from rollout_server.versions.publisher import timings_of

SAMPLE_S = 1.0
MOST_SAMPLES = 600
MOST_PUSHES = 256
MOST_MOVES = 512


class RowEvents(Protocol):
    """The events of a request, which ends early when it is aborted."""

    def __aiter__(self) -> AsyncIterator[TokensSampled | RowFinished]: ...

    def abort(self, reason: str = "disconnect") -> None: ...


class Sample(NamedTuple):
    """The engine at one moment. Counts are since the start; memory is in bytes."""

    time: float
    tokens: int
    steps: int
    running: int
    waiting: int
    preempted: int
    kv_filled: int
    kv_kept: int
    kv_limit: int
    hit_tokens: int


class Move(NamedTuple):
    """From this moment on a name pointed to this version, or to none."""

    time: float
    name: str
    number: int | None


@dataclass(frozen=True, slots=True)
class PushSeen:
    """What the engine's status does not say of a version."""

    delta_norm: float | None
    timings_ms: Mapping[str, float] | None
    """None of a version that was restored."""


class Observer:
    """One for each model. `status` gives its engine's snapshot; rows are told to `metrics` and the timings and bytes of
    pushes to `push`, under the name `model`. With `keep` False no rollout is kept."""

    def __init__(
        self,
        status: Callable[[], EngineStatus],
        metrics: RowMetrics,
        push: Callable[[Mapping[str, float], int, str], None],
        model: str = BASE,
        *,
        keep: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.versions = VersionTable()
        metrics.follow(model, self.versions)
        self._metrics = metrics
        self._push = push
        self._model = model
        self.rollouts = LatestRollouts(clock=clock)
        self.samples: deque[Sample] = deque(maxlen=MOST_SAMPLES)
        self.moves: deque[Move] = deque(maxlen=MOST_MOVES)
        self._status = status
        self._keep = keep
        self._clock = clock
        self._pushes: OrderedDict[tuple[str, int], PushSeen] = OrderedDict()
        self._moved = 0
        self._live: dict[str, int | None] = {}
        self._reading: set[asyncio.Task[None]] = set()

    # ---- rollouts -------------------------------------------------------------------------------------------------

    def watch(self, request_id: str, events: RowEvents) -> RowEvents:
        """The same events, of which the rows that end are noted."""
        return _Watched(request_id, events, self.finished, self._read_on)

    def _read_on(self, watched: RowEvents) -> None:
        """Reads what is left of a request that nobody reads any more: its rows end, and count."""
        reading = asyncio.create_task(_to_its_end(watched))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)

    def finished(self, request_id: str, rollout: Rollout) -> None:
        name = rollout.spans[-1].version.name if rollout.spans else BASE
        policies = self._status().policies
        live = next((policy.live for policy in policies if policy.name == name), None)
        now = live.number if live else 0
        self.versions.add(rollout, now)
        oldest = min((span.version.number for span in rollout.spans), default=now)
        self._metrics.ended(self._model, rollout, max(0, now - oldest))
        if self._keep and rollout.sampled:
            self.rollouts.add(request_id, rollout)

    # ---- versions -------------------------------------------------------------------------------------------------

    def published(self, publish: Publish, published: Published) -> None:
        """Notes an accepted push; the same weights again say nothing new."""
        bundle, timings, number = publish.bundle, timings_of(publish, published), published.version.number
        self._push(timings, bundle.nbytes, self._model)
        self._note((publish.name, number), PushSeen(delta_norm(bundle, published.changes), timings))
        if published.live:
            self.moved(publish.name, number)

    def restored(self, name: str, versions: Sequence[RestoredVersion]) -> None:
        """Notes a name that an earlier run left. Of DoRA and of tensors in place of the base's, no file says how much
        they change."""
        for kept in versions:
            spec = kept.bundle.spec
            known = kept.bundle.measures.keys() >= {*spec.dense} and spec.kind != "dora"
            self._note((name, kept.number), PushSeen(delta_norm(kept.bundle, {}) if known else None, None))
        self.moved(name, next((kept.number for kept in versions if kept.live), None))

    def _note(self, version: tuple[str, int], seen: PushSeen) -> None:
        self._pushes.setdefault(version, seen)
        while len(self._pushes) > MOST_PUSHES:
            self._pushes.popitem(last=False)

    def push_of(self, name: str, number: int) -> PushSeen | None:
        return self._pushes.get((name, number))

    def moved(self, name: str, number: int | None) -> None:
        """Notes where a name points from now on."""
        if self._live.get(name) != number:
            self._live[name] = number
            self.moves.append(Move(self._clock(), name, number))
            self._moved += 1

    def moves_since(self, count: int) -> tuple[int, list[Move]]:
        """How often names have moved in all, and those moves, as far as they are kept, that came after so many."""
        new = min(self._moved - count, len(self.moves))
        return self._moved, list(self.moves)[len(self.moves) - new :]

    # ---- time -----------------------------------------------------------------------------------------------------

    def sample(self) -> Sample:
        """The engine as it is now."""
        status = self._status()
        memory = status.memory
        return Sample(
            round(self._clock(), 3),
            status.tokens,
            status.steps,
            status.running,
            status.waiting,
            status.preempted,
            memory.kv_filled,
            memory.kv_kept,
            memory.kv_limit,
            status.prefix.hit_tokens,
        )

    async def sample_for_ever(self) -> None:
        """Keeps a sample a second. A few numbers are copied; the engine hears nothing of it."""
        while True:
            self.samples.append(self.sample())
            await asyncio.sleep(SAMPLE_S)


class _Watched:
    def __init__(
        self,
        request_id: str,
        events: RowEvents,
        finished: Callable[[str, Rollout], None],
        read_on: Callable[[RowEvents], None],
    ) -> None:
        self._request_id = request_id
        self._events = events
        self._iterator = aiter(events)
        self._finished = finished
        self._read_on = read_on

    def __aiter__(self) -> AsyncIterator[TokensSampled | RowFinished]:
        return self

    async def __anext__(self) -> TokensSampled | RowFinished:
        event = await anext(self._iterator)
        if isinstance(event, RowFinished):
            self._finished(self._request_id, event.rollout)
        return event

    def abort(self, reason: str = "disconnect") -> None:
        self._events.abort(reason)
        self._read_on(self)


async def _to_its_end(events: RowEvents) -> None:
    with suppress(RolloutError):
        async for _ in events:
            pass
