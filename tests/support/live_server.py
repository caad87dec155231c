"""A real server on loopback, for tests that go the whole way: in a process of its own, or in a thread of this one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from rollout_server.config import ServerConfig
from rollout_server.http.server import served
from tests.support.http.shared_routes import make_app
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutBatch

ROOT = Path(__file__).parents[2]
START_S, PATIENCE_S = 200.0, 120.0
"""Until a server is ready, and until what was caused has happened: enough for a busy machine, and over by then."""


@dataclass
class Server:
    """Where it listens."""

    url: str


@dataclass
class LiveServer(Server):
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def stop(self, *, within_s: float = PATIENCE_S) -> int:
        """Asks it to end as a process manager would; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=within_s)


def ranks(options: tuple[str, ...]) -> list[str]:
    """The same tests against an engine of several ranks, but for those that are about something else of processes."""
    count = os.environ.get("TEST_TENSOR_PARALLEL")
    own = {"--tensor-parallel", "--replicas", "--trace", "--also", "--memory", "--fleet", "--join"}
    return ["--tensor-parallel", count] if count and own.isdisjoint(options) else []


def replicas(options: tuple[str, ...]) -> list[str]:
    """What `make test-fleet` asks for: the same tests against several engines, but for those that say how many, or are
    about what one process does."""
    count = os.environ.get("TEST_REPLICAS")
    own = {"--replicas", "--trace", "--also", "--memory", "--fleet", "--join"}
    return ["--replicas", count] if count and own.isdisjoint(options) else []


def engines() -> int:
    """How many engines share what a server without options of its own is asked for."""
    return int(os.environ.get("TEST_REPLICAS", 1))


def assert_drawn_again(found: RolloutBatch, expected: RolloutBatch) -> None:
    """The same rows of a server a second time: to the bit where its engine is in its own process, which is given all
    prompts of a request at once. Elsewhere each prompt arrives by itself: batches have other shapes each time."""
    elsewhere = os.environ.get("TEST_REPLICAS") or os.environ.get("TEST_TENSOR_PARALLEL")
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert_near(found.logprobs, expected.logprobs, TINY.of_batch(expected) if elsewhere else 0.0)


def uncut(what: str) -> pytest.MarkDecorator:
    """Skips tests of what several ranks refuse by name."""
    return pytest.mark.skipif(bool(os.environ.get("TEST_TENSOR_PARALLEL")), reason=f"ranks refuse {what} by name")


@contextmanager
def live_server(
    model: Path | None, *options: str, environment: dict[str, str] | None = None, folder: Path = ROOT
) -> Iterator[LiveServer]:
    """`rollout-server serve` on a free port, in a folder; without `model` it serves the embedded one."""
    command = [
        sys.executable,
        "-m",
        "rollout_server",
        "serve",
        "--port",
        "0",
        *replicas(options),
        *ranks(options),
        *options,
    ]
    if model is not None:
        command += ["--model", str(model)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ROLLOUT_")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    log: list[str] = []
    found = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            log.append(line)
            if "ready at http" in line:
                found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        found.wait(START_S)
        ready = re.search(r'ready at (http://[^\s"]+)', "".join(log))
        if ready is None:
            raise RuntimeError("the server did not start:\n" + "".join(log))
        yield LiveServer(ready[1], process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def server_here(model: Path | None, **options: Any) -> Iterator[Server]:
    """As `live_server`, with fields of `ServerConfig` for options: for tests of what is answered, which neither end the
    process nor read its log. It costs a fifth of a process's time."""
    words = tuple(f"--{name.replace('_', '-')}" for name in options)
    asked = {"replicas": replicas(words), "tensor_parallel": ranks(words)}
    fields = {name: int(said[-1]) for name, said in asked.items() if said}
    config = ServerConfig(model=None if model is None else str(model), port=0, **fields, **options)
    with served(config, make_app) as url:
        yield Server(url)


def until(reached: object, within_s: float = PATIENCE_S) -> None:
    """Waits until `reached()` is true."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if reached():  # type: ignore[operator]
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def rows_ended(url: str, reason: str) -> float:
    """Rows that have ended so since the start, as the server's metrics count them."""
    lines = httpx.get(f"{url}/metrics").raise_for_status().text.splitlines()
    counts = (line for line in lines if line.startswith("rollout_rows_total{") and f'finish_reason="{reason}"' in line)
    return sum(float(line.rpartition(" ")[2]) for line in counts)
