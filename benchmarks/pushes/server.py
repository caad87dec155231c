"""The server as `rollout-server serve` runs it, and beside its routes a bare one that reads a body and discards it.

`python -m benchmarks.pushes.server MODEL [--state-dir DIR] [--keep-versions N]`. Both routes share process, event loop
and engine, so that they differ only in what is done with the body.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from litestar import Request, post

from rollout_server.machine.blas import load_fast_blas


@post("/bare", status_code=200)
async def bare(request: Request[Any, Any, Any]) -> dict[str, float]:
    """Milliseconds from the handler's start to the end of the body, as `timings_ms.receive` of a push."""
    began, read = time.perf_counter(), 0
    async for chunk in request.stream():
        read += len(chunk)
    return {"bytes": read, "receive": 1e3 * (time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pushes.server", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--keep-versions", type=int, default=8)
    options = parser.parse_args()
    load_fast_blas()  # Before anything imports mlx, hence the imports below.

    from rollout_server import logs
    from rollout_server.config import ServerConfig
    from rollout_server.http.app import create_app
    from rollout_server.http.server import announce, serve_app
    from rollout_server.machine.blas import one_thread_for_numpy
    from rollout_server.open_files import raise_limit

    logs.configure("text")
    raise_limit()
    one_thread_for_numpy()
    config = ServerConfig(
        model=str(options.model), port=0, keep_versions=options.keep_versions, state_dir=options.state_dir
    )
    app = create_app(config)
    app.register(bare)
    serve_app(lambda: app, config, announce)


if __name__ == "__main__":
    main()
