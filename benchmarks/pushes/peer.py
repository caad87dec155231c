"""`mlx_lm.server` between two adapters: for each change it drops the model and loads base and adapter again."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.servers.processes import post, server

START = """
import sys
from rollout_server.machine.blas import load_fast_blas
load_fast_blas()
from mlx_lm.server import main
sys.argv = ["mlx_lm.server", "--model", sys.argv[1], "--port", sys.argv[2]]
main()
"""
"""With the same BLAS as ours; what is slow without it is not what is compared."""


def swaps(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a one-token completion with another adapter than before, and with the same one."""
    import socket

    from benchmarks.pushes.bodies import RANK
    from tests.support.tiny_models import linear_layers, random_adapter, save_adapter

    layers = linear_layers(model)
    adapters = [
        str(save_adapter(folder / f"adapter-{seed}", *random_adapter(layers, RANK, seed, kind="mlx")))
        for seed in (1, 2)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    changed, same = [], []
    with server("-c", START, str(model), port, ready=r"(Starting httpd)"):
        url = f"http://127.0.0.1:{port}/v1/completions"
        for number in range(2 * rounds + 1):
            for times in (changed, same):
                body = {"model": str(model), "adapters": adapters[number % 2], "prompt": "5 9 33", "max_tokens": 1}
                began = time.perf_counter()
                post(url, body)
                times.append(time.perf_counter() - began)
            print(f"mlx_lm.server: changed {changed[-1]:.3f} s, same {same[-1]:.3f} s", file=sys.stderr, flush=True)
    swap = statistics.median(changed[1:]) - statistics.median(same[1:])
    return {
        "mlx_lm.server, change of adapter, ms": round(1e3 * swap, 1),
        "changed_ms": round(1e3 * statistics.median(changed[1:]), 1),
        "same_ms": round(1e3 * statistics.median(same[1:]), 1),
        "note": "rows that run are drained first, and new ones wait; nothing is decoded meanwhile",
    }
