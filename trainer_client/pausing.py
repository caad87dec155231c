"""The verbs that hold a server's new work, for a trainer that needs the machine. Pure functions, as in `calls.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from trainer_client.body import Body
from trainer_client.call import Call
from trainer_client.replies import Reply, need, parse_json

Mode = Literal["wait", "keep", "abort"]


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
