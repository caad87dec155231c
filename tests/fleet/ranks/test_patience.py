"""A rank waits for the others only so long, though MLX lets no thread of its process run meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout_server.fleet.ranks.environment import hosts_of

pytestmark = pytest.mark.timeout(300)
WAITING = """
from rollout_server.fleet.ranks.patience import patience
import mlx.core as mx
with patience(2.0):
    mx.distributed.init(strict=True, backend="ring")
"""
MET = """
from rollout_server.fleet.ranks.patience import patience
with patience(200.0):
    pass
"""


def ended(script: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=250, env={**os.environ, **settings}
    )


def test_a_process_whose_ranks_do_not_come_is_killed_and_the_log_says_why(tmp_path: Path) -> None:
    """Rank 0 of the ring waits to be called, and rank 1 was never started."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(hosts_of(2))
    alone = ended(WAITING, MLX_RANK="0", MLX_HOSTFILE=str(hosts))
    assert alone.returncode == -signal.SIGKILL
    assert "Not all ranks have met within 2 s: one of them ended before" in alone.stderr


def test_a_process_whose_ranks_have_met_goes_on_and_nobody_watches_it() -> None:
    began = time.monotonic()
    met = ended(MET)  # It returns when whoever holds its output has ended, too.
    assert (met.returncode, met.stderr) == (0, "")
    assert time.monotonic() - began < 200
