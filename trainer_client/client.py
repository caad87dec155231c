"""`RolloutClient` and `AsyncRolloutClient`: the same verbs over a blocking and an asyncio transport.

A verb is written once, in `calls.py`, `checking.py` or `keeping.py`, as a pure function that says what to send and how
to read the reply; `retry.py` says when to send it again. Here is only the difference between the two: how bytes travel
and how one waits.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import httpx

from trainer_client.errors import BadReply, ServerUnreachable
from trainer_client.retry import Flow, Retry, Sleep, answering, sending, until_ready
from trainer_client.verbs import classes, control, publishing, replicas, sampling, scoring
from trainer_client.wire.call import Call, StreamCall
from trainer_client.wire.replies import LineBuffer, Reply

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
V = TypeVar("V", bound=Callable[..., Any])

CONNECT_S = 10.0
IDLE_S = 2.0
"""A kept connection is dropped before the server, or a proxy before it, drops it, or a request could meet its end."""


class _Connection:
    """What both clients know of the server. `T` of a verb is the type of what it returns."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float | None, retry: Retry) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not a server address: it begins with http:// or https://.")
        self.url = url.rstrip("/")
        self.retry = retry
        self.options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {} if api_key is None else {"authorization": f"Bearer {api_key}"},
            "timeout": httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
            # no limit of our own on parallel requests: the server has a queue and says when it is full
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE_S),
            # a proxy from the environment would swallow calls to this very machine; give `transport` to use one
            "trust_env": False,
        }

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments of httpx's `build_request`, but for the body."""
        headers = dict(call.headers)
        if len(call.body):
            headers["content-length"] = str(len(call.body))
        arguments: dict[str, Any] = {
            "method": call.method,
            "url": call.path,
            "params": dict(call.query),
            "headers": headers,
        }
        if call.timeout_s is not None:
            arguments["timeout"] = httpx.Timeout(call.timeout_s, connect=min(CONNECT_S, call.timeout_s), pool=None)
        return arguments

    def unreachable(self, error: httpx.RequestError) -> ServerUnreachable:
        """The sentence for a request that got no reply."""
        cause = str(error) or type(error).__name__
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.UnsupportedProtocol():
                return ServerUnreachable(
                    f"No rollout server answers at {self.url} ({cause}). Is `rollout-server serve` running there?",
                    timed_out=isinstance(error, httpx.ConnectTimeout),
                )
            case httpx.TimeoutException():
                return ServerUnreachable(
                    f"{self.url} gave no reply in time ({cause}). The request may still be running there; "
                    "allow more with timeout_s.",
                    sent=True,
                    timed_out=True,
                )
            case _:
                return ServerUnreachable(
                    f"The connection to {self.url} was lost before the reply ({cause}).", sent=True
                )


# ---- verbs --------------------------------------------------------------------------------------------------------


def _method(build: Callable[..., Any], verb: V) -> V:
    """Gives `verb` the name, documentation and parameters of `build`, with `self` before them."""
    functools.update_wrapper(verb, build)
    signature = inspect.signature(build)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    verb.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    return verb


def _blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[RolloutClient, P], T]:
    def verb(self: RolloutClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return _method(build, verb)


def _blocking_stream(build: Callable[P, StreamCall[T]]) -> Callable[Concatenate[RolloutClient, P], Iterator[T]]:
    def verb(self: RolloutClient, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self.stream(build(*args, **kwargs))

    return _method(build, verb)


def _awaited(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncRolloutClient, P], Coroutine[Any, Any, T]]:
    # the call is built on the caller's thread, never on a worker: an MLX array belongs to the thread that made it
    async def verb(self: AsyncRolloutClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return _method(build, verb)


def _awaited_stream(
    build: Callable[P, StreamCall[T]],
) -> Callable[Concatenate[AsyncRolloutClient, P], AsyncIterator[T]]:
    def verb(self: AsyncRolloutClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return self.stream(build(*args, **kwargs))

    return _method(build, verb)


# ---- clients ------------------------------------------------------------------------------------------------------


class RolloutClient:
    """A rollout server, from a trainer's side. May be shared by threads; close it, or use it in a `with`.

    url        such as `http://127.0.0.1:8000`
    api_key    sent as `Authorization: Bearer`; pushing needs the server's admin key
    timeout_s  longest silence of the server in seconds before a call fails; None waits for ever
    retry      how often and how long to try again what can succeed later
    transport  an httpx transport to use instead of plain connections: a proxy, a unix socket, an app in this process
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float | None = 3600.0,
        retry: Retry | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._connection = _Connection(url, api_key, timeout_s, retry or Retry())
        self._http = httpx.Client(transport=transport, **self._connection.options)

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return self._connection.url

    push = _blocking(publishing.push)
    weights = _blocking(publishing.weights)
    policy = _blocking(publishing.policy)
    activate = _blocking(publishing.activate)
    pin = _blocking(publishing.pin)
    delete = _blocking(publishing.delete)
    delete_policy = _blocking(publishing.delete_policy)
    export = _blocking(publishing.export)
    rollouts = _blocking(sampling.rollouts)
    stream_rollouts = _blocking_stream(sampling.stream_rollouts)
    logprobs = _blocking(scoring.logprobs)
    replay = _blocking(scoring.replay)
    probe = _blocking(scoring.probe)
    rewards = _blocking(classes.rewards)
    classify = _blocking(classes.classify)
    rerank = _blocking(classes.rerank)
    completions = _blocking(sampling.completions)
    pause = _blocking(control.pause)
    resume = _blocking(control.resume)
    models = _blocking(control.models)
    health = _blocking(control.health)
    ready = _blocking(control.ready)
    fleet = _blocking(replicas.fleet)
    drain_replica = _blocking(replicas.drain_replica)
    restart_replica = _blocking(replicas.restart_replica)
    remove_replica = _blocking(replicas.remove_replica)

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the server is ready to sample; raises `ServerUnreachable` when the time is up."""
        self._run(until_ready(timeout_s))

    def send(self, call: Call[T]) -> T:
        """Makes one call of `trainer_client.verbs.sampling`, trying again where that can help."""
        return self._run(answering(call, self._connection.retry))

    def stream(self, call: StreamCall[T]) -> Iterator[T]:
        """Makes one streamed call; yields its values as they arrive."""
        response = self._run(sending(call, self._connection.retry)).opened
        with closing(response):
            buffer = LineBuffer()
            try:
                for chunk in response.iter_bytes():
                    for line in buffer.lines(chunk):
                        value = call.parse_line(line)
                        if value is None:
                            return
                        yield value
            except httpx.RequestError as error:
                raise self._connection.unreachable(error) from error
        raise BadReply(buffer.unfinished())

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flow: Flow[R]) -> R:
        try:
            step = next(flow)
            while True:
                if isinstance(step, Sleep):
                    time.sleep(step.seconds)
                    step = next(flow)
                    continue
                try:
                    reply = self._exchange(step.call)
                except ServerUnreachable as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(reply)
        except StopIteration as done:
            return done.value

    def _exchange(self, call: Call[Any]) -> Reply:
        content = cast("Iterator[bytes]", call.body.chunks()) if len(call.body) else None
        request = self._http.build_request(content=content, **self._connection.request(call))
        try:
            response = self._http.send(request, stream=True)
            if isinstance(call, StreamCall) and response.is_success:
                return Reply(response.status_code, response.headers, opened=response)
            with closing(response):
                body = bytearray()  # which arrays can be views of that a trainer may write to
                for chunk in response.iter_bytes():
                    body += chunk
                return Reply(response.status_code, response.headers, body)
        except httpx.RequestError as error:
            raise self._connection.unreachable(error) from error


class AsyncRolloutClient:
    """The same verbs as coroutines, with the same arguments as `RolloutClient`; `stream_rollouts` is an async iterator.
    Belongs to the event loop it is first used on; close it, or use it in an `async with`."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float | None = 3600.0,
        retry: Retry | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = _Connection(url, api_key, timeout_s, retry or Retry())
        self._http = httpx.AsyncClient(transport=transport, **self._connection.options)

    @property
    def url(self) -> str:
        """The server's URL, without a slash at the end."""
        return self._connection.url

    push = _awaited(publishing.push)
    weights = _awaited(publishing.weights)
    policy = _awaited(publishing.policy)
    activate = _awaited(publishing.activate)
    pin = _awaited(publishing.pin)
    delete = _awaited(publishing.delete)
    delete_policy = _awaited(publishing.delete_policy)
    export = _awaited(publishing.export)
    rollouts = _awaited(sampling.rollouts)
    stream_rollouts = _awaited_stream(sampling.stream_rollouts)
    logprobs = _awaited(scoring.logprobs)
    replay = _awaited(scoring.replay)
    probe = _awaited(scoring.probe)
    rewards = _awaited(classes.rewards)
    classify = _awaited(classes.classify)
    rerank = _awaited(classes.rerank)
    completions = _awaited(sampling.completions)
    pause = _awaited(control.pause)
    resume = _awaited(control.resume)
    models = _awaited(control.models)
    health = _awaited(control.health)
    ready = _awaited(control.ready)
    fleet = _awaited(replicas.fleet)
    drain_replica = _awaited(replicas.drain_replica)
    restart_replica = _awaited(replicas.restart_replica)
    remove_replica = _awaited(replicas.remove_replica)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once the server is ready to sample; raises `ServerUnreachable` when the time is up."""
        await self._run(until_ready(timeout_s))

    async def send(self, call: Call[T]) -> T:
        """Makes one call of `trainer_client.verbs.sampling`, trying again where that can help."""
        return await self._run(answering(call, self._connection.retry))

    async def stream(self, call: StreamCall[T]) -> AsyncIterator[T]:
        """Makes one streamed call; yields its values as they arrive."""
        response = (await self._run(sending(call, self._connection.retry))).opened
        async with aclosing(response):
            buffer = LineBuffer()
            try:
                async for chunk in response.aiter_bytes():
                    for line in buffer.lines(chunk):
                        value = call.parse_line(line)
                        if value is None:
                            return
                        yield value
            except httpx.RequestError as error:
                raise self._connection.unreachable(error) from error
        raise BadReply(buffer.unfinished())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncRolloutClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self, flow: Flow[R]) -> R:
        try:
            step = next(flow)
            while True:
                if isinstance(step, Sleep):
                    await asyncio.sleep(step.seconds)
                    step = next(flow)
                    continue
                try:
                    reply = await self._exchange(step.call)
                except ServerUnreachable as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(reply)
        except StopIteration as done:
            return done.value

    async def _exchange(self, call: Call[Any]) -> Reply:
        content = _asynchronous(call.body.chunks()) if len(call.body) else None
        request = self._http.build_request(content=content, **self._connection.request(call))
        try:
            response = await self._http.send(request, stream=True)
            if isinstance(call, StreamCall) and response.is_success:
                return Reply(response.status_code, response.headers, opened=response)
            async with aclosing(response):
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                return Reply(response.status_code, response.headers, body)
        except httpx.RequestError as error:
            raise self._connection.unreachable(error) from error


async def _asynchronous(chunks: Iterator[memoryview]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield cast("bytes", chunk)  # httpx joins what it gets, and a view is joined without being copied first
