"""What every reply gets, whatever the route: a line in the log, and a client that is still sending is let finish."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import cast

from litestar.enums import ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, HTTPReceiveMessage, Message, Receive, Scope, Send

log = logging.getLogger("rollout_server.access")

DRAIN_BYTES = 64 * 2**20
DRAIN_S = 5.0


class Courtesy(ASGIMiddleware):
    """A reply to a body that was not read to its end (413, 401) would be lost: closing the socket with unread data
    resets the connection. So what is left of the body is read and dropped first, within bounds."""

    scopes = (ScopeType.HTTP,)

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        began = time.perf_counter()
        exchange = _Exchange(scope, receive, send)
        try:
            await next_app(scope, exchange.receive, exchange.send)
        finally:
            took = 1e3 * (time.perf_counter() - began)
            fields = {
                "method": scope["method"],  # type: ignore[typeddict-item]
                "path": scope["path"],
                "status": exchange.status,
                "ms": round(took, 1),
            }
            log.info("%(method)s %(path)s %(status)s %(ms)s ms", fields, extra={"fields": fields})


class _Exchange:
    """One request and its reply, watched."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status = 0
        self._receive = receive
        self._send = send
        headers = dict(scope["headers"])
        # Such a client sends its body only when asked to: nothing is on its way.
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        self._unread = not waits and (b"content-length" in headers or b"transfer-encoding" in headers)

    async def receive(self) -> HTTPReceiveMessage:
        message = cast("HTTPReceiveMessage", await self._receive())
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._unread and self.status >= 400:
                await self._drain()
        await self._send(message)

    async def _drain(self) -> None:
        left = DRAIN_BYTES
        try:
            async with asyncio.timeout(DRAIN_S):
                while self._unread and left > 0:
                    message = await self.receive()
                    left -= len(message["body"]) if message["type"] == "http.request" else left
        except TimeoutError:
            return
