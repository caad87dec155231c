"""Middleware for every exchange, whatever the route: it logs a line, answers HEAD where there is GET, notes the time of
arrival, and lets a client finish that is still sending, unless the server stops."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import cast

from litestar.types import ASGIApp, HTTPReceiveMessage, HTTPScope, Message, Receive, Send

from rollout_server import logs
from rollout_server.errors import EngineUnavailable
from rollout_server.http.problems import REFUSED
from rollout_server.http.service import ARRIVED, ASKED
from rollout_server.quoting import shortened

log = logging.getLogger("rollout_server.access")

DRAIN_BYTES = 64 * 2**20
DRAIN_S = 5.0
PATH_SHOWN = 200


Observe = Callable[[str, str | None, int, float, str | None], None]
"""A function that is told of every exchange: method, template of the path, status, seconds, code of the error."""


async def courteous(
    app: ASGIApp, scope: HTTPScope, receive: Receive, send: Send, observe: Observe, stopping: Callable[[], bool]
) -> None:
    """Runs `app`. An error reply to a body that was not read to its end (401, 413) would be lost: closing a socket with
    unread data resets the connection. So what is left of the body is read and dropped first, within bounds. Once
    `stopping` says so, nothing more is read: who waits for a body gets `EngineUnavailable`."""
    began = time.perf_counter()
    exchange = _Exchange(scope, receive, send, stopping)
    method = scope["method"]
    inner = cast("HTTPScope", {**scope, "method": "GET"}) if method == "HEAD" else scope
    state = inner.setdefault("state", {})
    state |= {ARRIVED: time.monotonic(), ASKED: method}
    logs.about(state)
    try:
        await app(inner, cast("Receive", exchange.receive), exchange.send)
    finally:
        seconds = time.perf_counter() - began
        refused = state.get(REFUSED)
        observe(scope["method"], scope.get("path_template"), exchange.status, seconds, refused)
        fields = {
            "method": method,
            "path": shortened(scope["path"], PATH_SHOWN),
            "status": exchange.status,
            "ms": round(1e3 * seconds, 1),
            **({} if refused is None else {"code": refused}),
        }
        log.info("%(method)s %(path)s %(status)s %(ms)s ms", fields, extra={"fields": fields})


class _Exchange:
    """One request and its reply, watched."""

    def __init__(self, scope: HTTPScope, receive: Receive, send: Send, stopping: Callable[[], bool]) -> None:
        self.status = 0
        self._stopping = stopping
        self._receive = receive
        self._send = send
        self._head = scope["method"] == "HEAD"
        headers = dict(scope["headers"])
        # Such a client sends its body only when asked to: nothing is on its way.
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        self._unread = not waits and (b"content-length" in headers or b"transfer-encoding" in headers)

    async def receive(self) -> HTTPReceiveMessage:
        message = cast("HTTPReceiveMessage", await self._receive())
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        elif self._stopping():
            raise EngineUnavailable("The server is stopping: the body was not read to its end, and nothing changed.")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._unread and self.status >= 400 and not self._stopping():
                await self._drain()
        elif message["type"] == "http.response.body" and self._head:
            message["body"] = b""
        await self._send(message)

    async def _drain(self) -> None:
        left = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_S):
                while self._unread and left > 0:
                    message = await self.receive()
                    left -= len(message["body"]) if message["type"] == "http.request" else left
        except (TimeoutError, EngineUnavailable):
            return
