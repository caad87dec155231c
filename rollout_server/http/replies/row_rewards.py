"""Rewards of the rows of one call: each is asked for when its row has ended, and the row is told of when it is there.

Whatever keeps a reward away costs the reward and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.engine.open_requests import HeldScorer
from rollout_server.errors import EngineFault, RolloutError
from rollout_server.http.metrics import Metrics
from rollout_server.http.replies.streaming import RowEvents
from rollout_server.http.requests.json_body import beside
from rollout_server.rollout import FinishReason, Rollout, RowError, RowReward
from rollout_server.text.pictures.picture import Picture

log = logging.getLogger("rollout_server.http")

ENDED = frozenset({FinishReason.STOP, FinishReason.LENGTH, FinishReason.SUPERSEDED})
"""Rows that are scored: others were given up."""
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reward model reads rows."""

    ids: Callable[[Rollout], Sequence[int]]
    """What it reads of a row. Raises `RolloutError` where that cannot be read."""
    position: Callable[[Sequence[int]], int]
    """Where in it the head is applied."""
    shared: Callable[[Rollout, Sequence[int]], int] = lambda *_: 0
    """How many tokens of it the other rows of its prompt begin with as well."""
    pictures: Callable[[Rollout], tuple[Picture, ...]] = lambda rollout: ()
    """What its placeholders stand for."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long rewards are waited for."""

    timeout_s: float | None
    """From the end of a row on."""
    deadline: float | None
    """When the request is over, on the clock."""
    clock: Callable[[], float] = time.monotonic
    sleep: Sleep = asyncio.sleep

    @property
    def left_s(self) -> float | None:
        """For a row that has just ended; None for as long as it takes."""
        until = None if self.deadline is None else max(0.0, self.deadline - self.clock())
        return min((limit for limit in (self.timeout_s, until) if limit is not None), default=None)


class RewardedRows:
    """The events of a request whose rows come with their rewards, each when its own is there. Lets the scorer go when
    all have come, or when it is aborted."""

    def __init__(
        self, events: RowEvents, scorer: HeldScorer, reading: Reading, patience: Patience, metrics: Metrics
    ) -> None:
        self._events = events
        self._scorer = scorer
        self._reading = reading
        self._patience = patience
        self._metrics = metrics
        self._ready: asyncio.Queue[TokensSampled | RowFinished | None] = asyncio.Queue()
        """None: there are no more."""
        self._left = False
        self._asking: set[asyncio.Task[RowReward]] = set()
        self._work = asyncio.create_task(self._run())

    @property
    def labels(self) -> int:
        """How many the reward model scores."""
        return len(self._scorer.labels)

    def __aiter__(self) -> AsyncIterator[TokensSampled | RowFinished]:
        return self

    async def __anext__(self) -> TokensSampled | RowFinished:
        event = await self._ready.get()
        if event is not None:
            return event
        self._ready.put_nowait(None)
        if (fault := await self._work) is not None:
            raise fault
        raise StopAsyncIteration

    def abort(self, reason: str = "disconnect") -> None:
        """Ends the request, and whatever is being scored for it. Its rows still come, without a reward."""
        self._left = True
        self._events.abort(reason)
        for asking in self._asking:
            asking.cancel()
        self._scorer.let_go()

    async def _run(self) -> RolloutError | None:
        """Returns what the request failed with; rows that ended before it still get their rewards."""
        fault = None
        try:
            async with asyncio.TaskGroup() as rows:
                try:
                    async for event in self._events:
                        if isinstance(event, RowFinished):
                            rows.create_task(self._finish(event))
                        else:
                            self._ready.put_nowait(event)
                except RolloutError as error:
                    fault = error
        finally:
            self._scorer.let_go()
            self._ready.put_nowait(None)
        return fault

    async def _finish(self, event: RowFinished) -> None:
        reward = NOBODY_WAITS
        if not self._left:
            # A task of its own: a row whose reward nobody waits for any more still comes.
            asking = asyncio.create_task(self._reward(event.rollout))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            try:
                reward = await asking
            except asyncio.CancelledError:
                if not self._left:
                    raise
        self._ready.put_nowait(replace(event, rollout=replace(event.rollout, reward=reward)))

    async def _reward(self, rollout: Rollout) -> RowReward:
        if rollout.finish_reason not in ENDED:
            return _none("not_scored", f"The row ended as {rollout.finish_reason}, and such rows are not scored.")
        began, limit = self._patience.clock(), self._patience.left_s
        try:
            scores = await self._within(limit, self._scores(rollout))
        except RolloutError as error:
            reward = _none(error.code, error.message)
        except Exception as error:  # A failed reward loses no row, whatever a model's own template may raise.
            log.error("The reward of a row failed.", exc_info=error)
            why = f"The reward of this row failed by {type(error).__name__}; the server's log says where."
            reward = _none(EngineFault.code, why)
        else:
            reward = _late(limit or 0.0) if scores is None else RowReward(scores, self._scorer.version)
        took, model = self._patience.clock() - began, self._scorer.version.called
        self._metrics.reward(took, model, scored=reward.error is None)
        return reward

    async def _scores(self, rollout: Rollout) -> tuple[float, ...]:
        reading = self._reading

        def read() -> tuple[Sequence[int], int]:
            ids = reading.ids(rollout)
            return ids, reading.shared(rollout, ids)

        ids, shared = await beside(len(rollout.token_ids) + len(rollout.prompt_ids), read)
        return await self._scorer.scores(ids, reading.position(ids), shared, reading.pictures(rollout))

    async def _within(self, limit: float | None, work: Awaitable[tuple[float, ...]]) -> tuple[float, ...] | None:
        """None where it takes longer; it is ended then."""
        if limit is None:
            return await work
        task = asyncio.ensure_future(work)
        timer = asyncio.ensure_future(self._patience.sleep(limit))
        try:
            await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            timer.cancel()


def _none(code: str, message: str) -> RowReward:
    return RowReward(error=RowError(code, message))


NOBODY_WAITS = _none("not_scored", "Nobody waits any more for the reward of this row.")


def _late(limit_s: float) -> RowReward:
    return _none("timeout", f"The reward was not there {round(limit_s, 2):.12g} seconds after the row had ended.")
