"""Work beside the event loop that ends when the client who waits for it has left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from litestar import Request

from rollout_server.errors import BadBody
from rollout_server.http.replies.streaming import GONE, while_connected
from rollout_server.http.requests.json_body import LONG

R = TypeVar("R")

GoOn = Callable[[], None]
"""Called between two pieces of work; raises `BadBody` once nobody waits for it."""


async def beside_client(request: Request[Any, Any, Any], weight: int, work: Callable[[GoOn], R]) -> R:
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
