"""The servers that are compared, as users start them, on the benchmark model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.servers.processes import Served, server


@contextmanager
def our_process(model: Path, *options: str) -> Iterator[Served]:
    """`rollout-server serve`."""
    with server("-m", "rollout_server", "serve", "--port", "0", "--model", str(model), *options) as served:
        yield served


@contextmanager
def our_server(model: Path, *options: str) -> Iterator[str]:
    """`rollout-server serve`; its URL."""
    with our_process(model, *options) as served:
        yield served.url


@contextmanager
def peer_server(model: Path, concurrency: int, *options: str) -> Iterator[str]:
    """`mlx_lm.server` with as many rows in a batch as we have, for prompts too, and the same BLAS; its URL."""
    port = _free_port()
    command = [
        "-m",
        "benchmarks.servers.peer_server",
        "--model",
        str(model),
        "--port",
        str(port),
        "--log-level",
        "WARNING",
    ]
    command += ["--decode-concurrency", str(concurrency), "--prompt-concurrency", str(concurrency), *options]
    # It listens once it has warned; the model loads behind that, in the round that warms up.
    with server(*command, ready=r"(mlx_lm\.server is not recommended)"):
        yield f"http://127.0.0.1:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
