"""Over a real socket: clients that leave, bodies that are too large, crowds, signals."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from rollout_server.config import ServerConfig
from rollout_server.errors import EngineUnavailable
from rollout_server.http.app import create_app
from rollout_server.http.server import StoppableServer, bound_socket, serve_app, served, url_of
from rollout_server.rollout import RolloutRequest
from tests.support.http.fake_engine import FakeEngine, Row
from tests.support.http.fixtures import MakeApp
from tests.support.live_server import until as reached

HANGS = {"policy": "base", "prompts": [{"token_ids": [1]}]}
ENDS = {"policy": "base", "prompts": [{"token_ids": [1, 2]}]}
SECONDS = 30.0
"""Longest wait for what happens at once."""


def script(request: RolloutRequest, sample: int) -> Row:
    return Row([60, 61], hangs=len(request.prompt_ids) == 1)


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    return FakeEngine(tokenizer, script)


@pytest.fixture
def url(engine: FakeEngine, made_app: MakeApp) -> Iterator[str]:
    """A server on a thread of its own and a port of its own."""
    config = ServerConfig(port=0, max_upload=100_000, max_body=100_000, admin_key="admin")  # type: ignore[arg-type]
    ready: asyncio.Future[str] | list[str] = []
    told = threading.Event()

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
    assert engine.life[-1] == "closed"


def client(url: str, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, timeout=SECONDS, trust_env=False, headers={"authorization": "Bearer admin"}, **options
    )


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SECONDS):
        while not await condition():  # noqa: ASYNC110  (another process, or thread, decides)
            await asyncio.sleep(0.01)


async def asked(engine: FakeEngine, id: str) -> bool:
    return id in engine.open


async def aborted(engine: FakeEngine) -> bool:
    return bool(engine.aborted)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rollouts", HANGS | {"id": "left"}),
        ("/v1/rollouts", HANGS | {"id": "left", "stream": True}),
        ("/v1/completions", {"model": "base", "prompt": [1]}),
        ("/v1/completions", {"model": "base", "prompt": [1], "stream": True}),
    ],
    ids=["rollouts", "rollouts-stream", "completions", "completions-stream"],
)
def test_a_client_that_leaves_aborts_its_request(url: str, engine: FakeEngine, path: str, body: dict[str, Any]) -> None:
    async def leave() -> None:
        async with client(url) as http:
            asking = asyncio.create_task(http.post(path, json=body, headers={"x-request-id": "left"}))
            await until(partial(asked, engine, "left"))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await until(partial(aborted, engine))
            assert engine.aborted == [("left", "disconnect")]
            assert (await http.post("/v1/rollouts", json=ENDS)).status_code == 200

    asyncio.run(leave())


def test_a_client_that_leaves_in_the_middle_of_a_stream(url: str, engine: FakeEngine) -> None:
    async def leave() -> None:
        body = {"model": "base", "prompt": [1], "stream": True}
        async with client(url) as http:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                assert (await anext(response.aiter_lines())).startswith("data: ")
            await until(partial(aborted, engine))

    asyncio.run(leave())


def test_a_request_that_ended_is_not_aborted(url: str, engine: FakeEngine) -> None:
    async def ask() -> None:
        async with client(url) as http:
            for body in (ENDS, ENDS | {"stream": True}):
                assert (await http.post("/v1/rollouts", json=body)).status_code == 200

    asyncio.run(ask())
    assert engine.aborted == []


async def pieces(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 50_000):
        yield b"x" * 50_000


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("path", ["/v1/weights?name=policy", "/v1/rollouts"])
def test_a_body_over_the_limit_is_answered_not_cut_off(
    url: str, engine: FakeEngine, path: str, announced: bool, problem: Callable[..., Any]
) -> None:
    """The reply arrives although the client is still sending, and the connection serves the next request."""

    async def send() -> httpx.Response:
        media_type = "application/json" if "rollouts" in path else "application/octet-stream"
        body = b"x" * 5_000_000 if announced else pieces(5_000_000)
        async with client(url) as http:
            response = await http.post(path, content=body, headers={"content-type": media_type})
            assert (await http.get("/health")).status_code == 200
            return response

    problem(asyncio.run(send()), 413, "body_too_large")
    assert not engine.published


def test_a_push_without_a_key_is_answered_not_cut_off(url: str, problem: Callable[..., Any]) -> None:
    async def send() -> httpx.Response:
        async with client(url) as http:
            headers = {"authorization": "Bearer wrong", "content-type": "application/octet-stream"}
            return await http.post("/v1/weights?name=policy", content=b"x" * 5_000_000, headers=headers)

    problem(asyncio.run(send()), 401, "unauthorized")


def test_who_asks_before_sending_is_answered_before_sending(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(
            b"POST /v1/weights?name=policy HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer admin\r\n"
            b"Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_an_upload_that_breaks_off_changes_nothing(url: str, engine: FakeEngine) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(
            b"POST /v1/weights?name=policy HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer admin\r\n"
            b"Content-Type: application/octet-stream\r\nContent-Length: 5000\r\n\r\n" + b"x" * 100
        )

    async def ask() -> int:
        async with client(url) as http:
            return (await http.post("/v1/rollouts", json=ENDS)).status_code

    assert asyncio.run(ask()) == 200
    assert not engine.published


def test_a_crowd_is_served_without_a_reset(url: str, engine: FakeEngine) -> None:
    """512 connections that are all open at once, as mlx-lm's own server cannot have 32."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(ENDS).encode()
    head = f"POST /v1/rollouts HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    sent = f"{head}Authorization: Bearer admin\r\nContent-Type: application/json\r\n\r\n".encode() + body

    async def crowd() -> list[bytes]:
        pairs = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(512)))
        for _, writer in pairs:
            writer.write(sent)
        replies = await asyncio.gather(*(reader.read() for reader, _ in pairs))
        for _, writer in pairs:
            writer.close()
        return replies

    replies = asyncio.run(crowd())
    assert {reply.partition(b"\r\n")[0] for reply in replies} == {b"HTTP/1.1 200 OK"}
    ids = {json.loads(reply.partition(b"\r\n\r\n")[2])["id"] for reply in replies}
    assert len(ids) == len(engine.submitted) == 512


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    with bound_socket(ServerConfig(port=0)) as listener:
        listener.listen()
        config = ServerConfig(port=listener.getsockname()[1])
        with pytest.raises(EngineUnavailable, match="cannot be used"):
            serve_app(lambda: pytest.fail("it was made, which may download a model"), config, print)


@pytest.mark.parametrize(("host", "asked"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
def test_a_server_is_asked_where_one_can_ask(host: str, asked: str) -> None:
    with bound_socket(ServerConfig(host=host, port=0, insecure=True)) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://{asked}:{port}"
        assert url_of(listener, "studio") == f"http://{'studio' if host == '0.0.0.0' else asked}:{port}"


def test_a_start_that_fails_raises_its_cause(engine: FakeEngine) -> None:
    engine.state = "dead"
    config = ServerConfig(port=0)
    with bound_socket(config) as listener:
        server = StoppableServer(create_app(config, engine), config, listener, print)  # type: ignore[arg-type]
        with pytest.raises(EngineUnavailable, match="cannot be loaded"):
            asyncio.run(server.until_stopped())


def test_a_signal_ends_open_requests_by_name(problem: Callable[..., Any]) -> None:
    command = [sys.executable, "-m", "tests.support.http.serve_fake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert found is not None
            whole, lines = asyncio.run(stopped_under(found[0], lambda: server.send_signal(signal.SIGTERM)))
            _, log = server.communicate(timeout=SECONDS)
        finally:
            server.kill()
    problem(whole, 503, "engine_unavailable")
    assert json.loads(lines[0])["token_ids"] == [60, 61]
    assert json.loads(lines[-1])["error"]["code"] == "engine_unavailable"
    assert server.returncode == 0, log
    assert all(json.loads(line)["level"] == "info" for line in log.splitlines() if line.startswith("{"))


async def stopped_under(url: str, stop: Callable[[], None]) -> tuple[httpx.Response, list[str]]:
    """A reply and a stream that were open when the server was told to stop."""
    streamed = {"policy": "base", "prompts": [{"token_ids": [1, 2]}, {"token_ids": [1]}], "stream": True}
    async with client(url) as http, http.stream("POST", "/v1/rollouts", json=streamed) as response:
        lines = response.aiter_lines()
        first = await anext(lines)
        asking = asyncio.create_task(http.post("/v1/rollouts", json=HANGS))

        async def both_open() -> bool:
            return bool((await http.get("/health")).json()["waiting"] == 2)

        await until(both_open)
        stop()
        return await asking, [first, *[line async for line in lines]]


def test_a_server_that_died_refuses_its_clients(
    engine: FakeEngine, made_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would take them from the backlog of a socket that stays open."""
    dies = threading.Event()

    class Mortal(StoppableServer):
        async def on_tick(self, counter: int) -> bool:
            if dies.is_set():
                raise RuntimeError("it dies")
            return await super().on_tick(counter)

    def refused() -> bool:
        try:
            httpx.get(f"{url}/health", timeout=SECONDS)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:  # The one that it took last.
            pass
        return False

    # Only what starts now: servers of other tests go on in this process, and each of them would die.
    monkeypatch.setattr("rollout_server.http.server.StoppableServer", Mortal)
    make = partial(made_app, engine=engine)
    with pytest.raises(RuntimeError, match="it dies"), served(ServerConfig(port=0), make) as url:
        assert not refused()
        dies.set()
        reached(refused, SECONDS)
