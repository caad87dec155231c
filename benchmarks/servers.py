"""Servers as users start them: processes of their own on loopback, on the benchmark model."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
START_S = 120.0


@contextmanager
def our_server(model: Path, *options: str) -> Iterator[str]:
    """`rollout-server serve`; its URL."""
    port = _free_port()
    command = [sys.executable, "-m", "rollout_server", "serve", "--model", str(model), "--port", str(port), *options]
    with _running(command, port, "/ready") as url:
        yield url


@contextmanager
def peer_server(model: Path, concurrency: int) -> Iterator[str]:
    """`mlx_lm.server` with as many rows in a batch as we have, for prompts too, and the same BLAS; its URL."""
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.peer_server", "--model", str(model), "--port", str(port)]
    command += ["--decode-concurrency", str(concurrency), "--prompt-concurrency", str(concurrency)]
    with _running([*command, "--log-level", "WARNING"], port, "/health") as url:
        yield url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _running(command: list[str], port: int, path: str) -> Iterator[str]:
    """Start a server, wait until it answers 200 on `path`, and end it afterwards. Raises RuntimeError if it does not
    answer."""
    with tempfile.TemporaryFile() as log:
        yield from _watched(command, port, path, log)


def _watched(command: list[str], port: int, path: str, log: IO[bytes]) -> Iterator[str]:
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_S
        while not _answers(url + path):
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read().decode(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
