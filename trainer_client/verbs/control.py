"""The server itself: what it serves, whether it lives, and pausing it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from trainer_client.data.versions import ServedModel
from trainer_client.wire.call import Body, Call
from trainer_client.wire.parsing import parse_models
from trainer_client.wire.replies import Reply, need, parse_json

PROBE_S = 5.0
"""Seconds to wait for the answer of a health check."""
Mode = Literal["wait", "keep", "abort"]


def models() -> Call[tuple[ServedModel, ...]]:
    """What can be asked for: the base, names, and kept versions, with context length, vocabulary and digest."""
    return Call(method="GET", path="/v1/models", parse=parse_models, idempotent=True)


def health() -> Call[bool]:
    """Returns whether the server's engine lives and answers. Asked once; raises `ServerUnreachable` if nobody
    answers."""
    return _yes_or_no("/health")


def ready() -> Call[bool]:
    """Returns whether the server has its model and can sample. Asked once; raises `ServerUnreachable` if nobody
    answers."""
    return _yes_or_no("/ready")


def _yes_or_no(path: str) -> Call[bool]:
    return Call(method="GET", path=path, parse=lambda reply: reply.status < 400, accepts=(503,), timeout_s=PROBE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseState:
    paused: bool
    mode: str | None
    """The mode of the pause; None where nothing is paused."""
    waiting: int
    """Requests in the queue."""
    running: int
    """Rows in the batch."""


def pause(mode: Mode = "wait") -> Call[PauseState]:
    """Lets new work wait. Running rows go on (`wait`), freeze (`keep`), or end with their requests, which are answered
    with what they have (`abort`). Pushes, activation and aborts work meanwhile. Returns at once."""
    return Call(
        method="POST",
        path="/v1/pause",
        parse=_parse,
        headers={"content-type": "application/json"},
        body=Body((json.dumps({"mode": mode}).encode(),)),
        idempotent=True,
    )


def resume() -> Call[PauseState]:
    """Lets new work begin again; does nothing if nothing is paused."""
    return Call(method="POST", path="/v1/resume", parse=_parse, idempotent=True)


def _parse(reply: Reply) -> PauseState:
    body = parse_json(reply.body)
    return PauseState(
        paused=need(body, "paused", bool),
        mode=body.get("mode"),
        waiting=need(body, "waiting", int),
        running=need(body, "running", int),
    )
