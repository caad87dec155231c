"""Corners of HTTP: whatever is sent, the answer has the form of every other."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.http.server import StoppableServer, bound_socket
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.fixtures import MakeApp
from tests.support.http.raw import SECONDS, ask, connect, read

GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SAID = b'{"prompt": "1+1="}'


@pytest.fixture
def url(engine: FakeEngine, made_app: MakeApp) -> Iterator[str]:
    """A server without keys on a free port."""
    config, ready, told = ServerConfig(port=0), [], threading.Event()

    def announced(url: str, _: str) -> None:
        ready.append(url)
        told.set()

    with bound_socket(config) as listener:
        server = StoppableServer(made_app(config, engine), config, listener, announced)
        thread = threading.Thread(target=lambda: asyncio.run(server.until_stopped()))
        thread.start()
        assert told.wait(SECONDS)
        yield ready[0]
        server.should_exit = True
        thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 a handshake of TLS\r\n\r\n",
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000,
        b"GET /v1/weights/a\x00b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models?x=1 y HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n",
        b"GET /health\r\n\r\n",
        POST + b"Content-Length: abc\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Transfer-Encoding: gzip\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX\r\n",
    ],
)
def test_what_is_no_http_is_answered_as_every_error_is(
    url: str, sent: bytes, problem: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    reply = ask(url, sent)
    assert "HTTP" in problem(reply, 400, "bad_body")["message"] or "headers" in reply.text
    assert reply.closed and reply.headers["connection"] == "close" and len(reply.body) < 400
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert ask(url, GET % b"/health").status == 200


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 18\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n" + SAID + b"\r\n0\r\n\r\n",
        POST + b"transfer-encoding: CHUNKED\r\ncontent-length: 0\r\n\r\n0\r\n\r\n",
        POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_body_with_two_ends_is_refused_and_nothing_after_it_is_read(
    url: str, engine: FakeEngine, sent: bytes, problem: Callable[..., Any]
) -> None:
    engine.add("p", 2)
    smuggled = b"DELETE /v1/weights/p HTTP/1.1\r\nHost: localhost\r\n\r\n"
    reply = ask(url, sent + smuggled)
    problem(reply, 400, "bad_body", "Transfer-Encoding")
    assert reply.closed and engine.live("p").number == 2


@pytest.mark.parametrize("scheme", [b"http", b"https", b"HTTP"])
def test_a_target_in_absolute_form_means_its_path(url: str, engine: FakeEngine, scheme: bytes) -> None:
    engine.add("p", 2)
    assert ask(url, GET % (scheme + b"://localhost:1/v1/weights/p")).json()["live"] == 2
    target = b"POST " + scheme + b"://127.0.0.1/tokenize HTTP/1.1"
    sent = POST.replace(b"POST /tokenize HTTP/1.1", target) + b"Content-Length: 18\r\n\r\n" + SAID
    assert ask(url, sent).json()["count"] > 0
    assert ask(url, GET % (scheme + b"://localhost")).status == 200, "the page"
    assert ask(url, GET % (scheme + b"://localhost?x=1")).json()["error"]["param"] == "x"
    assert ask(url, GET % (scheme + b"://localhost/health?x=1")).json()["error"]["param"] == "x"


def test_its_host_counts_and_not_the_header(url: str, problem: Callable[..., Any]) -> None:
    problem(ask(url, GET % b"http://rebound.example/health"), 403, "forbidden", "Host")
    problem(ask(url, GET % b"http://user@localhost/health"), 403, "forbidden", "Host")
    problem(ask(url, GET % b"http:///health"), 403, "forbidden", "Host")
    sent = (GET % b"http://localhost/health").replace(b"Host: localhost", b"Host: proxy.example")
    assert ask(url, sent).status == 200


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (GET % b"/nope", 404, "not_found"),
        (GET % b"nope", 404, "not_found"),
        (GET % b"*", 404, "not_found"),
        (GET % b"/v1/x/../models", 404, "not_found"),
        (GET % b"/v1/weights/%2e%2e", 404, "unknown_policy"),
        (GET % b"/v1/weights/a%00b", 404, "unknown_policy"),
        (GET % b"/v1/weights/%ff", 404, "unknown_policy"),
        (GET % b"//v1//weights//nobody", 404, "unknown_policy"),
        ((GET % b"/health").replace(b"GET", b"get"), 405, "method_not_allowed"),
        ((GET % b"/health").replace(b"GET", b"BREW"), 405, "method_not_allowed"),
        (b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost:443\r\n\r\n", 404, "not_found"),
        (b"PRI * HTTP/2.0\r\nHost: localhost\r\n\r\n", 404, "not_found"),
    ],
)
def test_odd_targets_and_methods(url: str, sent: bytes, status: int, code: str, problem: Callable[..., Any]) -> None:
    problem(ask(url, sent), status, code)


def test_requests_in_one_go_are_answered_in_turn(url: str) -> None:
    keeps = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(url) as connection:
        connection.sendall(keeps % b"/health" + keeps % b"/nope" + keeps % b"/health" + b"no HTTP\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    found = [line.split()[1] for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1")]
    # The JSON of a reply and the next status line are on one line.
    statuses = found + [part[:3] for part in received.split(b"}HTTP/1.1 ")[1:]]
    assert sorted(statuses) == [b"200", b"200", b"400", b"404"]
    assert received.endswith(b'"retryable":false}}')


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
def test_an_offer_to_change_the_protocol_is_passed_over_in_silence(
    url: str, upgrade: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    offer = b"Connection: Upgrade\r\nUpgrade: " + upgrade + b"\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13"
    with caplog.at_level(logging.INFO):
        assert ask(url, (GET % b"/health").replace(b"Connection: close", offer)).status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


def test_a_client_that_breaks_its_body_is_no_fault_of_the_server(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with connect(url) as connection, caplog.at_level(logging.INFO):
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        connection.sendall(b"ZZ\r\n")
        assert read(connection).status == 400
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.mark.parametrize("given", ["", "  "])
def test_an_empty_request_id_is_none(client: TestClient[Any], given: str) -> None:
    body = {"policy": "base", "prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 2}}
    for path, sent in (
        ("/v1/rollouts", body | {"id": "mine"}),
        ("/v1/completions", {"model": "base", "prompt": [5], "max_tokens": 2}),
        ("/v1/logprobs", {"policy": "base", "sequences": [{"token_ids": [5]}]}),
    ):
        assert client.post(path, json=sent, headers={"x-request-id": given}).status_code == 200, path


@pytest.mark.parametrize("slash", ["%2F", "%2f", "%5C", "%5c"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/v1/weights/p{}2"),
        ("DELETE", "/v1/weights{}p"),
        ("DELETE", "/v1/weights/p{}"),
        ("DELETE", "//v1/weights/p{}2"),
        ("PATCH", "/v1/weights/p{}1"),
        ("POST", "/v1/weights/p{}activate"),
        ("GET", "/v1/weights/p{}1/export"),
        ("GET", "/v1/weights/p{}1{}export"),
        ("GET", "/v1{}models"),
    ],
)
def test_an_encoded_slash_is_part_of_no_name(
    client: TestClient[Any], engine: FakeEngine, method: str, path: str, slash: str, problem: Callable[..., Any]
) -> None:
    engine.add("p", 3)
    before = client.get("/v1/weights/p").json()
    problem(client.request(method, path.replace("{}", slash)), 400, "invalid_field")
    assert client.get("/v1/weights/p").json() == before


def test_the_base_s_id_may_have_a_slash_either_way(client: TestClient[Any]) -> None:
    for path in ("/v1/models/org/tiny", "/v1/models/org%2Ftiny"):
        assert client.get(path).json()["id"] == "org/tiny"
