"""Middleware for every exchange, whatever the route: it refuses what no route would answer, logs a line, answers HEAD
where there is GET, notes the time of arrival, and lets a client finish that is still sending, unless the server stops.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import unquote

import msgspec
from litestar.types import ASGIApp, HTTPReceiveMessage, HTTPScope, Message, Receive, Scope, Send

from rollout_server import logs
from rollout_server.config import ServerConfig
from rollout_server.errors import BadBody, EngineUnavailable, InvalidField, RolloutError
from rollout_server.http.auth import check_host
from rollout_server.http.problems import REFUSED, body_of, headers_of, row_of
from rollout_server.http.service import ARRIVED, ASKED
from rollout_server.http.sockets.connection import CROWDED, too_many
from rollout_server.logs import REQUEST_ID
from rollout_server.quoting import shortened
from rollout_server.schemas.fields import ID

log = logging.getLogger("rollout_server.access")

DRAIN_BYTES = 64 * 2**20
DRAIN_S = 5.0
PATH_SHOWN = 200
ABSOLUTE = re.compile(rb"https?://([^/?#]*)([^?#]*)", re.IGNORECASE)
SLASH = re.compile(rb"%(?:2f|5c)", re.IGNORECASE)
WITH_SLASHES = b"/v1/models/"
"""The route whose rest is one name: a Hub id has a slash, and OpenAI's client encodes it."""
FOR_SUPERVISORS = frozenset({"/health", "/ready"})


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
    state |= {ARRIVED: time.monotonic(), ASKED: method, REQUEST_ID: _id_of(scope)}
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


def _id_of(scope: HTTPScope) -> str:
    """What lines about the request call it: `X-Request-Id` if that can be an id, else a fresh one. A route whose body
    or reply has an id puts that in its place."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1").strip()
    return given if ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


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


# ---- what no route would answer -------------------------------------------------------------------------------------


def in_origin_form(scope: HTTPScope) -> HTTPScope:
    """A target like `http://host/path`, as for a proxy, means the path; its host counts and the header does not
    (RFC 9112, 3.2.2)."""
    absolute = ABSOLUTE.fullmatch(_raw_path(scope))
    if absolute is None:
        return scope
    raw = absolute[2] or b"/"
    others = [header for header in scope["headers"] if header[0].lower() != b"host"]
    changed = {"raw_path": raw, "path": unquote(raw.decode("ascii")), "headers": [(b"host", absolute[1]), *others]}
    return cast("HTTPScope", {**scope, **changed})


def refusal(scope: HTTPScope, config: ServerConfig) -> RolloutError | None:
    """The error that every route would answer to this request with; None if it is not refused."""
    if scope.get("state", {}).get(CROWDED) and scope["path"] not in FOR_SUPERVISORS:
        return too_many()
    try:
        _check_framing(scope)
        if not config.protected:
            check_host(scope, config)
        _check_path(scope)
    except RolloutError as error:
        return error
    return None


def is_last(scope: HTTPScope) -> bool:
    """Returns whether the connection ends with the reply: nobody knows where the next request would begin, or it is in
    the way of others."""
    return bool(scope.get("state", {}).get(CROWDED)) or _is_ambiguous(scope)


def refusing(error: RolloutError) -> ASGIApp:
    """An application that answers with this fault."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[REFUSED] = error.code
        body = msgspec.json.encode(body_of(error))
        headers = {"content-type": "application/json", "content-length": str(len(body)), **headers_of(error)}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": row_of(error).status, "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return answer


def closing(send: Send) -> Send:
    """`send` for a reply that is the last of its connection."""

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    return tell


def _is_ambiguous(scope: HTTPScope) -> bool:
    names = {name.lower() for name, _ in scope["headers"]}
    return b"transfer-encoding" in names and (b"content-length" in names or scope.get("http_version") == "1.0")


def _check_framing(scope: HTTPScope) -> None:
    """Refuses both headers together: a proxy that believes the length and one that believes the chunks see different
    requests."""
    if _is_ambiguous(scope):
        other = "HTTP/1.0" if scope.get("http_version") == "1.0" else "Content-Length"
        raise BadBody(
            f"The request says twice where its body ends, with Transfer-Encoding and {other}: send one of them.",
            param="Transfer-Encoding",
        )


def _check_path(scope: HTTPScope) -> None:
    """Refuses an encoded slash: routes are looked for in the decoded path, where `p%2F2` is two parts."""
    raw = _raw_path(scope)
    if not raw.startswith(WITH_SLASHES) and (found := SLASH.search(raw)):
        raise InvalidField(
            f"The path holds {found[0].decode()}, an encoded slash or backslash: no name and no id has one."
        )


def _raw_path(scope: HTTPScope) -> bytes:
    return (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0]
