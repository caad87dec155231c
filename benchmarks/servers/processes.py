"""Servers and load generators of a benchmark: real processes, ended when the block is left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_S = 300.0
"""Until a server is ready: a large model, on a device whose kernels are made at the start."""


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    pid: int

    def metrics(self) -> dict[str, float]:
        """Samples of the base that have no other label, by name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            lines = reply.read().decode().replace('{model="base"}', "").splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line[:1] != "#" and "{" not in line}

    @property
    def tokens(self) -> float:
        """Sampled since the start."""
        return self.metrics()["rollout_tokens_total"]

    @property
    def resident_mb(self) -> float:
        """Memory of the process."""
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return int(shown.stdout) / 1024


@contextmanager
def server(*command: str, ready: str = r"ready at (http://\S+)", **environment: str) -> Iterator[Served]:
    """`python COMMAND…` once its output says that it is `ready`; the first group is its address."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    lines: list[str] = []
    found = threading.Event()

    def read() -> None:
        # To its end, or the pipe would fill up and the server wait for ever.
        for line in process.stdout or ():
            if not found.is_set():
                lines.append(line)
            if re.search(ready, line):
                found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        found.wait(START_S)
        match = re.search(ready, "".join(lines))
        if match is None:
            raise RuntimeError("The server did not start:\n" + "".join(lines))
        yield Served(match[1], process.pid)
    finally:
        process.kill()
        process.wait()


@contextmanager
def load(served: Served, *options: str, warm_s: float = 4.0) -> Iterator[None]:
    """`benchmarks.pushes.load` inside the block, which begins when it has run for a while."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.pushes.load", served.url, *options], stdin=subprocess.PIPE, cwd=ROOT
    )
    try:
        before = served.tokens
        while served.tokens == before and process.poll() is None:
            time.sleep(0.2)
        time.sleep(warm_s)
        yield
        if process.poll() is not None:
            raise RuntimeError("The load generator ended by itself; what it said is above.")
    finally:
        process.kill()
        process.wait()


def post(url: str, body: object) -> dict[str, object]:
    """JSON in, JSON out."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer: dict[str, object] = json.loads(reply.read())
    return answer
