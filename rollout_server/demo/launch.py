"""Starts the trainer process: `python -m rollout_server.demo.launch --url …`.

The trainer may not import the server, yet its process too needs the fast BLAS before mlx, and mlx-lm without what that
does to limits. So this module sees to both and then runs the folder `trainer` beside it as a package of its own: no
other module of the server is loaded.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from rollout_server.machine.blas import load_fast_blas
from rollout_server.open_files import import_mlx_lm


def main() -> None:
    load_fast_blas()
    import_mlx_lm()
    sys.path.insert(0, str(Path(__file__).parent))
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
