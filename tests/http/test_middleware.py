"""What every exchange goes through, told to applications of a few lines: no server, no socket, no route."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rollout_server.config import ServerConfig
from rollout_server.errors import BadBody, EngineUnavailable, Forbidden, InvalidField, QueueFull
from rollout_server.http.middleware import (
    DRAIN_BYTES,
    closing,
    courteous,
    in_origin_form,
    is_last,
    refusal,
    refusing,
)
from rollout_server.http.sockets.connection import CROWDED

App = Callable[[Any, Any, Any], Awaitable[None]]


def scope_of(path: str = "/v1/models", *headers: tuple[bytes, bytes], method: str = "POST", **fields: Any) -> Any:
    known = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "http_version": "1.1"}
    return {**known, "headers": [(b"host", b"localhost"), *headers], **fields}


class Client:
    """Sends a body in pieces, the last of which may be on its way for ever, and keeps what it is told."""

    def __init__(self, *pieces: bytes, whole: bool = True) -> None:
        self.left = list(pieces)
        self.whole = whole
        self.told: list[Any] = []

    async def receive(self) -> Any:
        if not self.left and not self.whole:
            await asyncio.Event().wait()
        body = self.left.pop(0) if self.left else b""
        return {"type": "http.request", "body": body, "more_body": bool(self.left) or not self.whole}

    async def send(self, message: Any) -> None:
        # How much had come when it was told.
        self.told.append({**message, "left": len(self.left)})


def exchanged(app: App, scope: Any, client: Client, *, stopping: bool = False) -> list[tuple[Any, ...]]:
    """Runs one exchange and returns what was observed of it, without its seconds."""
    seen: list[tuple[Any, ...]] = []

    def observe(method: str, path: str | None, status: int, seconds: float, code: str | None) -> None:
        assert seconds >= 0
        seen.append((method, path, status, code))

    asyncio.run(courteous(app, scope, client.receive, client.send, observe, lambda: stopping))
    return seen


def answering(status: int, reads: int = 0, methods: list[str] | None = None) -> App:
    """An application that reads so many pieces before it answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if methods is not None:
            methods.append(scope["method"])
        for _ in range(reads):
            await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"content", "more_body": False})

    return app


SENDS = (b"content-length", b"3")


# ---- one exchange -------------------------------------------------------------------------------------------------


def test_a_head_is_a_get_without_its_body_and_is_observed_as_what_it_was() -> None:
    client, methods = Client(), list[str]()
    seen = exchanged(answering(200, methods=methods), scope_of(method="HEAD", path_template="/v1/models"), client)
    assert methods == ["GET"] and seen == [("HEAD", "/v1/models", 200, None)]
    assert [message.get("body") for message in client.told] == [None, b""]


def test_what_is_left_of_a_body_is_read_before_an_error_is_told() -> None:
    client = Client(b"a", b"b", b"c")
    exchanged(answering(413, reads=1), scope_of("/v1/weights", SENDS), client)
    assert [message["left"] for message in client.told] == [0, 0]


@pytest.mark.parametrize(
    ("status", "headers"),
    [(200, [SENDS]), (413, []), (413, [SENDS, (b"expect", b"100-Continue")])],
    ids=["an answer", "no body", "a body that waits to be asked for"],
)
def test_nothing_is_read_where_nothing_would_be_lost(status: int, headers: list[tuple[bytes, bytes]]) -> None:
    client = Client(b"a", b"b", b"c")
    exchanged(answering(status), scope_of("/v1/weights", *headers), client)
    assert [message["left"] for message in client.told] == [3, 3]


def test_a_body_without_an_end_is_dropped_within_bounds() -> None:
    piece = bytes(DRAIN_BYTES // 4)
    client = Client(*[piece] * 9)
    exchanged(answering(401), scope_of("/v1/weights", (b"transfer-encoding", b"chunked")), client)
    assert client.told[0]["left"] == 9 - 4


def test_a_server_that_stops_neither_waits_for_a_body_nor_drains_it() -> None:
    client = Client(b"a", whole=False)
    with pytest.raises(EngineUnavailable, match="nothing changed"):
        exchanged(answering(200, reads=1), scope_of("/v1/weights", SENDS), client, stopping=True)
    late = Client(b"a", b"b", b"c")
    exchanged(answering(503), scope_of("/v1/weights", SENDS), late, stopping=True)
    assert [message["left"] for message in late.told] == [3, 3]
    whole = Client(b"abc")
    assert exchanged(answering(200, reads=1), scope_of("/v1/weights", SENDS), whole, stopping=True)[0][2] == 200


def test_an_exchange_that_fails_is_observed_all_the_same() -> None:
    seen: list[int] = []

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    client = Client()
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(
            courteous(
                broken, scope_of(), client.receive, client.send, lambda *each: seen.append(each[2]), lambda: False
            )
        )
    assert seen == [0]


@pytest.mark.parametrize(("given", "kept"), [(b" r-1 ", True), (b"", False), (b"a/b", False), (b"a" * 129, False)])
def test_a_request_is_called_by_an_id_that_is_one(given: bytes, kept: bool) -> None:
    found: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(scope["state"])

    exchanged(app, scope_of("/", (b"x-request-id", given)), Client())
    (state,) = found
    ids = [value for value in state.values() if isinstance(value, str) and value != "POST"]
    assert ids == ["r-1"] if kept else len(ids) == 1 and ids[0].startswith("req-")


# ---- what no route would answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://other:80/v1/models?a=b", "/v1/models", b"other:80"),
        (b"HTTPS://other", "/", b"other"),
        (b"http://other/a%20b", "/a b", b"other"),
        (b"/v1/models", "/v1/models", b"localhost"),
        (b"//other/v1", "//other/v1", b"localhost"),
    ],
)
def test_a_target_with_a_host_means_that_host(target: bytes, path: str, host: bytes) -> None:
    given = scope_of(target.partition(b"?")[0].decode(), (b"accept", b"*/*"), raw_path=target)
    found = in_origin_form(given)
    assert found["path"] == path
    assert [value for name, value in found["headers"] if name == b"host"] == [host]
    assert (b"accept", b"*/*") in found["headers"]


CHUNKED = (b"Transfer-Encoding", b"chunked")


@pytest.mark.parametrize(
    ("scope", "error"),
    [
        (scope_of(), None),
        (scope_of("/v1/weights", CHUNKED), None),
        (scope_of("/v1/weights", CHUNKED, SENDS), BadBody),
        (scope_of("/v1/weights", CHUNKED, http_version="1.0"), BadBody),
        (scope_of("/v1/policies/a%2fb"), InvalidField),
        (scope_of("/v1/policies/a%5Cb"), InvalidField),
        (scope_of("/v1/models/org%2Fname"), None),
        (scope_of("/", raw_path=b"/?next=%2F"), None),
        (scope_of("/", headers=[(b"host", b"rebound.example")]), Forbidden),
        (scope_of("/", headers=[]), None),
        (scope_of(state={CROWDED: True}), EngineUnavailable),
        (scope_of("/health", state={CROWDED: True}), None),
    ],
)
def test_what_no_route_would_answer_is_refused_before_it(scope: Any, error: type[Exception] | None) -> None:
    found = refusal(scope, ServerConfig())
    assert found is None if error is None else type(found) is error


def test_a_connection_ends_where_nobody_knows_the_next_request_s_beginning() -> None:
    assert is_last(scope_of("/", CHUNKED, SENDS)) and is_last(scope_of("/", CHUNKED, http_version="1.0"))
    assert is_last(scope_of(state={CROWDED: True}))
    assert not is_last(scope_of("/", CHUNKED)) and not is_last(scope_of("/", SENDS))


def test_a_refusal_is_an_answer_whose_connection_may_be_closed() -> None:
    client, error = Client(b"abc"), QueueFull("Try later.")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await refusing(error)(scope, receive, closing(send))

    assert exchanged(app, scope_of("/v1/rollouts", SENDS), client) == [("POST", None, 429, "queue_full")]
    start, content = client.told
    headers = dict(start["headers"])
    assert headers[b"connection"] == b"close" and headers[b"x-should-retry"] == b"true"
    assert int(headers[b"content-length"]) == len(content["body"])
    assert json.loads(content["body"])["error"]["message"] == "Try later."
    assert start["left"] == 0, "what was being sent is read first"
