"""Replies while their client waits: events of a request as one reply, as server-sent events, or as lines of JSON; and
work beside the event loop. A client that leaves ends either."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.background_tasks import BackgroundTask
from litestar.response import Stream

from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.errors import BadBody, RolloutError
from rollout_server.http.observing.observer import RowEvents as RowEvents
from rollout_server.http.problems import body_of, error_of_row
from rollout_server.http.requests.json_body import LONG
from rollout_server.rollout import FinishReason, Rollout, RolloutRequest, RowError, Timings

T = TypeVar("T")
GoOn = Callable[[], None]
"""Called between two pieces of work; raises `BadBody` once nobody waits for it."""

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
SSE_DONE = b"data: [DONE]\n\n"
GONE = "The connection was closed before the reply."


async def disconnected(request: Request[Any, Any, Any]) -> None:
    """Returns when the client goes away; only after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request[Any, Any, Any], work: Awaitable[T]) -> T:
    """Awaits `work`; cancels it if the client leaves first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise BadBody(GONE)
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def beside_client(request: Request[Any, Any, Any], weight: int, work: Callable[[GoOn], T]) -> T:
    """Does what `json_body.beside` does, for long work that comes in pieces. A thread cannot be stopped, so it has to
    ask."""
    if weight < LONG:
        return work(_always)
    left = threading.Event()

    def go_on() -> None:
        if left.is_set():
            raise BadBody(GONE)

    try:
        return await while_connected(request, asyncio.to_thread(work, go_on))
    finally:
        left.set()


def _always() -> None:
    """While the event loop waits for the work, it would not hear that anybody leaves."""


# ---- whole replies ------------------------------------------------------------------------------------------------


async def collect(
    request: Request[Any, Any, Any], subscription: RowEvents, groups: Sequence[RolloutRequest]
) -> list[Rollout]:
    """Every row of the request, by prompt, then sample. An error is raised only if no row produced anything; else the
    rows that are missing are reported with it."""
    rows: dict[tuple[int, int], Rollout] = {}
    try:
        await while_connected(request, _gather(subscription, rows))
    except RolloutError as error:
        if not any(rollout.sampled for rollout in rows.values()):
            raise
        for group in groups:
            for sample in range(group.n):
                rows.setdefault((group.prompt_index, sample), failed_row(group, sample, error))
    finally:
        subscription.abort("disconnect")
    rollouts = [rows[key] for key in sorted(rows)]
    refuse_if_nothing_ran(rollouts)
    return rollouts


async def _gather(subscription: RowEvents, rows: dict[tuple[int, int], Rollout]) -> None:
    async for event in subscription:
        if isinstance(event, RowFinished):
            rows[event.rollout.prompt_index, event.rollout.sample_index] = event.rollout


def refuse_if_nothing_ran(rollouts: Sequence[Rollout]) -> None:
    """A request whose rows all failed before their first token fails as a whole."""
    failed = [rollout.error for rollout in rollouts if rollout.error is not None and not rollout.sampled]
    if rollouts and len(failed) == len(rollouts):
        raise error_of_row(failed[0].code, failed[0].message)


def failed_row(group: RolloutRequest, sample: int, error: RolloutError) -> Rollout:
    """A row that the engine could not report any more."""
    prefix = group.prefix
    return Rollout(
        prompt_index=group.prompt_index,
        sample_index=sample,
        prompt_ids=group.prompt_ids,
        token_ids=prefix.token_ids,
        logprobs=prefix.logprobs,
        sampling_logprobs=prefix.sampling_logprobs,
        log_kept_mass=prefix.missing,
        spans=(),
        finish_reason=FinishReason.ERROR,
        stop_reason=None,
        seed=group.seeds[sample],
        sampling=group.sampling,
        timings=Timings(0.0, 0.0, 0.0),
        error=RowError(error.code, error.message),
        prefix=prefix,
    )


# ---- streams ------------------------------------------------------------------------------------------------------


def _produced(event: TokensSampled | RowFinished) -> bool:
    return isinstance(event, TokensSampled) or event.rollout.error is None or event.rollout.sampled > 0


async def opening(request: Request[Any, Any, Any], subscription: RowEvents) -> list[TokensSampled | RowFinished]:
    """Events up to the first that shows a row at work, so that a request of which nothing ran answers with a status
    of its own."""
    events: list[TokensSampled | RowFinished] = []

    async def take() -> None:
        async for event in subscription:
            events.append(event)
            if _produced(event):
                return

    try:
        await while_connected(request, take())
    except (RolloutError, asyncio.CancelledError):
        subscription.abort("disconnect")
        raise
    refuse_if_nothing_ran([event.rollout for event in events if isinstance(event, RowFinished)])
    return events


async def chained(
    first: Sequence[TokensSampled | RowFinished], subscription: RowEvents
) -> AsyncIterator[TokensSampled | RowFinished]:
    """The events of the opening, then the others."""
    for event in first:
        yield event
    async for event in subscription:
        yield event


def ndjson_line(content: Any) -> bytes:
    return msgspec.json.encode(content) + b"\n"


def sse_event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def _ending_in_error(lines: AsyncIterator[bytes], media_type: str) -> AsyncIterator[bytes]:
    """A fault after the start is the last line; then nothing says that the stream is done."""
    try:
        async for line in lines:
            yield line
    except RolloutError as error:
        yield sse_event(body_of(error)) if media_type == SSE else ndjson_line(body_of(error))


def stream(
    lines: AsyncIterator[bytes],
    *,
    media_type: str,
    subscription: RowEvents | None = None,
    headers: dict[str, str] | None = None,
) -> Stream:
    """A streamed reply. However it ends, the request behind it ends too."""

    async def end() -> None:
        if subscription is not None:
            subscription.abort("disconnect")

    return Stream(
        _ending_in_error(lines, media_type),
        status_code=200,
        media_type=media_type,
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"} | (headers or {}),
        background=BackgroundTask(end),
    )
