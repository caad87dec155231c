"""When to try again, written once for both clients as generators: they yield what to do next, the client does it and
sends the reply in or throws `ServerUnreachable`. No I/O here."""

from __future__ import annotations

import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer_client.errors import ServerError, ServerUnreachable, UnknownPolicy, VersionGone
from trainer_client.verbs.control import ready
from trainer_client.wire.call import Call, LookedUpCall
from trainer_client.wire.replies import Reply, parse_error

T = TypeVar("T")

FIRST_POLL_S, LONGEST_POLL_S = 0.1, 1.0
"""Seconds between two questions whether the server is ready; loading a large model takes minutes."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Bounds on trying again. Only what the server calls retryable is, and lost connections of idempotent calls."""

    attempts: int = 5
    """Requests in all, the first one included; 1 never tries again."""
    first_delay_s: float = 0.25
    """Doubles with each attempt, unless the server says `Retry-After`."""
    longest_delay_s: float = 30.0
    """A server that asks for more is not waited for."""

    def delay_s(self, attempt: int, asked_s: float | None, luck: float) -> float | None:
        """Seconds to wait after attempt 1, 2, …; None to give up. `luck` in [0, 1) spreads clients that failed
        together; it never makes a wait shorter than the server asked for."""
        if attempt >= self.attempts or (asked_s is not None and asked_s > self.longest_delay_s):
            return None
        if asked_s is not None:
            return asked_s + self.first_delay_s * luck
        return min(self.first_delay_s * 2.0 ** (attempt - 1), self.longest_delay_s) * (0.5 + luck / 2)


@dataclass(frozen=True, slots=True)
class Send:
    """Make this request and send its reply into the flow."""

    call: Call[Any]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait, then go on with `next`."""

    seconds: float


Flow = Generator[Send | Sleep, Reply, T]


def answering(call: Call[T], retry: Retry) -> Flow[T]:
    """Returns what the call is for. A push looks first whether the server has the weights."""
    if isinstance(call, LookedUpCall) and call.look is not None:
        found = call.look.parse((yield from sending(call.look, retry)))
        if not isinstance(found, Call | None):
            return found
        if found is not None:
            try:
                return found.parse((yield from sending(found, retry)))
            except (VersionGone, UnknownPolicy):
                pass  # freed since it was looked at: the upload makes it again
    return call.parse((yield from sending(call, retry)))


def sending(call: Call[Any], retry: Retry) -> Flow[Reply]:
    """Returns the first reply that is not an error; raises the last error when there is no trying again."""
    attempt = 0
    while True:
        attempt += 1
        error: ServerError | ServerUnreachable
        try:
            reply = yield Send(call)
        except ServerUnreachable as unreachable:
            error = unreachable
            asked_s = None
            # nobody knows how far a request got that timed out; waiting as long again would help nobody
            worthwhile = call.idempotent and not (unreachable.sent and unreachable.timed_out)
        else:
            if reply.status < 400 or reply.status in call.accepts:
                return reply
            error = parse_error(reply)
            asked_s = error.retry_after_s
            worthwhile = error.retryable
        delay_s = retry.delay_s(attempt, asked_s, random.random()) if worthwhile else None
        if delay_s is None:
            raise error
        yield Sleep(delay_s)


def until_ready(timeout_s: float) -> Flow[Reply]:
    """Asks `/ready` until it says yes. Raises `ServerUnreachable` with the last answer when the time is up, and at once
    what is not a matter of time, such as a wrong address."""
    deadline = time.monotonic() + timeout_s
    pause_s = FIRST_POLL_S
    while True:
        error: ServerError | ServerUnreachable
        try:
            reply = yield Send(ready())
        except ServerUnreachable as unreachable:
            error = unreachable
        else:
            if reply.status < 400:
                return reply
            error = parse_error(reply)
            if reply.status not in ready().accepts:
                raise error
        if time.monotonic() + pause_s > deadline:
            message = f"The server was not ready within {timeout_s:g} s. Its last answer: {error.message}"
            raise ServerUnreachable(message, sent=True, timed_out=True) from error
        yield Sleep(pause_s)
        pause_s = min(pause_s * 1.5, LONGEST_POLL_S)
