"""An example as a user runs it: a process of its own, in an environment that has nothing of the test's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Set by the Makefile where more processes run than there are cores; an example is one of them."""


def run_example(path: str, *arguments: str, timeout_s: float = 500) -> subprocess.CompletedProcess[str]:
    """Its end, with what it has written; `path` begins at the root."""
    threads = {name: os.environ[name] for name in THREADS if name in os.environ}
    return subprocess.run(
        [sys.executable, path, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", **threads},
    )
