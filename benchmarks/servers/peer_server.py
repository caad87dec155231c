"""`python -m benchmarks.servers.peer_server …`: `mlx_lm.server` with its own options, on the BLAS that our server
takes."""

from __future__ import annotations

from rollout_server.machine.blas import load_fast_blas

if __name__ == "__main__":
    load_fast_blas()  # Without it the peer would be some fifty times slower on Linux.

    from mlx_lm.server import main

    main()
