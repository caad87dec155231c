"""A server that is told to stop: whoever still sends is answered at once, and a second signal leaves no trace."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from tests.laws.grids import some_long
from tests.support.http.raw import SECONDS, connect, read

HOST = b"Host: localhost\r\n"
JSON = HOST + b"Content-Type: application/json\r\n"
OCTETS = HOST + b"Content-Type: application/octet-stream\r\n"
HANGS = b'{"policy": "base", "prompts": [{"token_ids": [1]}]}'

HALF_SENT = {
    "upload": b"POST /v1/weights?name=p HTTP/1.1\r\n" + OCTETS + b"Content-Length: 100000\r\n\r\nxxxx",
    "form": b"POST /v1/weights HTTP/1.1\r\n" + HOST + b"Content-Type: multipart/form-data; boundary=b\r\n"
    b'Content-Length: 5000\r\n\r\n--b\r\nContent-Disposition: form-data; name="weights"\r\n\r\nxx',
    "chunks": b"POST /v1/weights?name=p HTTP/1.1\r\n" + OCTETS + b"Transfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n",
    "asks first": b"POST /v1/weights?name=p HTTP/1.1\r\n" + OCTETS + b"Content-Length: 9000\r\n\r\n",
    "rollouts": b"POST /v1/rollouts HTTP/1.1\r\n" + JSON + b"Content-Length: 100\r\n\r\n{",
    "completions": b"POST /v1/completions HTTP/1.1\r\n" + JSON + b"Content-Length: 100\r\n\r\n",
    "chat": b"POST /v1/chat/completions HTTP/1.1\r\n" + JSON + b"Connection: close\r\nContent-Length: 100\r\n\r\n{",
    "tokenize": b"POST /tokenize HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
    "activate": b"POST /v1/weights/p/activate HTTP/1.1\r\n" + JSON + b"Content-Length: 100\r\n\r\n{",
    "pin": b"PATCH /v1/weights/p/1 HTTP/1.1\r\n" + JSON + b"Content-Length: 100\r\n\r\n{",
    "abort": b"POST /v1/abort HTTP/1.1\r\n" + JSON + b"Content-Length: 100\r\n\r\n{",
}


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def ended(self) -> list[dict[str, Any]]:
        """Its log, once it has ended."""
        _, log = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, log
        return [json.loads(line) for line in log.splitlines()]


@contextmanager
def fake_server(*before: str) -> Iterator[Server]:
    """The real process over the scripted engine, without keys; `before` is what its command begins with."""
    command = [*before, sys.executable, "-m", "tests.support.http.serve_fake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found is not None
            yield Server(process, found[0])
        finally:
            process.kill()


def test_whoever_is_still_sending_is_told_at_once(problem: Callable[..., Any]) -> None:
    with fake_server() as server, ExitStack() as stack:
        connections = {name: stack.enter_context(connect(server.url)) for name in HALF_SENT}
        for name, connection in connections.items():
            connection.sendall(HALF_SENT[name])
        # A later request on a connection that was used before.
        again = connections["again"] = stack.enter_context(connect(server.url))
        again.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        assert read(again).status == 200
        again.settimeout(SECONDS)
        again.sendall(HALF_SENT["rollouts"])
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        for name, connection in connections.items():
            error = problem(read(connection), 503, "engine_unavailable")
            assert error["retryable"] and "stopping" in error["message"], name
            connection.close()
        log = server.ended()
    assert {entry["level"] for entry in log} == {"info"}, log
    assert len([entry for entry in log if entry.get("status") == 503]) == len(HALF_SENT) + 1


@pytest.mark.long
def test_a_stream_that_goes_on_coming_does_not_hold_it_up(problem: Callable[..., Any]) -> None:
    with fake_server() as server, connect(server.url) as connection:
        connection.sendall(b"POST /v1/weights?name=p HTTP/1.1\r\n" + OCTETS + b"Content-Length: 2000000000\r\n\r\n")
        connection.sendall(b"x" * 1_000_000)
        server.process.send_signal(signal.SIGTERM)
        connection.settimeout(0.001)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                connection.send(b"x" * 1000)
                time.sleep(0.001)
            except (TimeoutError, BlockingIOError):
                continue
            except OSError:
                break  # it has closed
        connection.settimeout(SECONDS)
        assert problem(read(connection), 503, "engine_unavailable")["retryable"]
        assert {entry["level"] for entry in server.ended()} == {"info"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "pause_s"),
    some_long([(signal.SIGINT, 0.0), (signal.SIGTERM, 0.2)], (signal.SIGTERM, 0.2)),
    ids=["SIGINT", "SIGTERM"],
)
def test_a_second_signal_leaves_no_traces(number: signal.Signals, pause_s: float) -> None:
    with fake_server() as server, connect(server.url) as hanging, connect(server.url) as sending:
        hanging.sendall(b"POST /v1/rollouts HTTP/1.1\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(HANGS) + HANGS)
        sending.sendall(HALF_SENT["upload"])
        time.sleep(0.3)
        for _ in range(3):
            if server.process.poll() is None:
                server.process.send_signal(number)
                time.sleep(pause_s)
        log = server.ended()
    assert {entry["level"] for entry in log} == {"info"}, log


@pytest.mark.long
def test_a_reader_that_does_not_read_is_waited_for_and_cut_off() -> None:
    """`shutdown_s` of `serve_fake` is short; nothing is cancelled, so nothing leaves a trace."""
    body = json.dumps({"policy": "base", "prompts": [{"token_ids": [5, 6]}] * 10_000}).encode()
    with fake_server("env", "ROLLOUT_SHUTDOWN_S=0.5") as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        host, _, port = server.url.removeprefix("http://").partition(":")
        connection.connect((host, int(port)))
        connection.sendall(b"POST /v1/rollouts HTTP/1.1\r\n" + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(1)  # the reply has begun, and is larger than what sockets keep
        server.process.send_signal(signal.SIGTERM)
        log = server.ended()
    levels = [entry["level"] for entry in log if entry["level"] != "info"]
    assert levels == ["warning"] and not [entry for entry in log if "exception" in entry], log
