"""More connections than files may be open: the log stays short, the rest is told, and it passes by itself."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rollout_server.http.sockets.connection import PATIENCE_S
from rollout_server.open_files import OpenFiles
from tests.http.test_stopping import Server, fake_server
from tests.support.http.raw import Reply, ask, connect
from tests.support.live_server import until

ROOT = Path(__file__).parents[3]
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def get(url: str, path: bytes = b"/v1/models") -> Reply:
    return ask(url, GET % path)


def told(connections: list[socket.socket]) -> int:
    """How many of those that never asked were answered all the same."""
    found = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            found += connection.recv(100).startswith(b"HTTP/1.1 503")
        except BlockingIOError:
            continue
    return found


pytestmark = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")


def limit(pid: int, soft: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, 4096))


def warnings(server: Server) -> list[str]:
    server.process.terminate()
    return [entry["message"] for entry in server.ended() if entry["level"] != "info"]


@pytest.mark.long
def test_a_crowd_that_says_nothing(problem: Callable[..., Any]) -> None:
    crowd, allowed = 200, OpenFiles(64, 4096)
    with fake_server() as server, ExitStack() as stack:
        limit(server.process.pid, 64)
        connections = [stack.enter_context(connect(server.url)) for _ in range(crowd)]
        refused = problem(get(server.url), 503, "engine_unavailable")
        assert refused["retryable"] and "64 files" in refused["message"]
        # The last places are for those that ask after the health, and who sits there without asking loses it.
        until(lambda: get(server.url, b"/health").status == 200, PATIENCE_S + 10)
        assert get(server.url, b"/ready").status == 200
        problem(get(server.url), 503, "engine_unavailable")
        assert allowed.crowded is not None
        assert crowd - allowed.crowded <= told(connections) < crowd
        stack.close()
        until(lambda: get(server.url).status == 200)
        (said,) = warnings(server)
    assert "Too many connections" in said


@pytest.mark.long
def test_no_file_is_left_for_one_more() -> None:
    """It is accepted in the place of the file that is kept for this, answered and closed."""
    code = """
import os, resource, socket
from rollout_server.config import ServerConfig
from rollout_server.http.server import bound_socket
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with bound_socket(ServerConfig(port=0)) as listener:
    listener.listen()
    listener.setblocking(False)
    callers = [socket.create_connection(listener.getsockname()) for _ in range(3)]
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    for _ in range(2):
        try:
            listener.accept()
        except BlockingIOError:
            pass
        else:
            raise SystemExit("one was accepted")
    print([caller.recv(12) for caller in callers].count(b"HTTP/1.1 503"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.long
def test_not_even_that_one() -> None:
    """The limit comes down below every file that is open: nobody can be accepted, and the server waits in peace."""
    with fake_server() as server, ExitStack() as stack:
        pid = server.process.pid
        limit(pid, 4)
        waiting = [stack.enter_context(connect(server.url)) for _ in range(60)]
        waiting[0].sendall(GET % b"/v1/models")
        time.sleep(0.5)
        began, busy = time.monotonic(), cpu_s(pid)
        time.sleep(2.5)
        assert cpu_s(pid) - busy < 0.5 * (time.monotonic() - began)
        limit(pid, 4096)
        assert waiting[0].recv(12) == b"HTTP/1.1 200"
        assert get(server.url).status == 200
        (said,) = warnings(server)
    assert "Too many connections" in said


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
