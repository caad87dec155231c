"""The example of a reranker, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.live_server import LiveServer

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_trained_reranker_puts_right_answers_first(live: LiveServer) -> None:
    command = [sys.executable, "examples/rerank.py", "--url", live.url, "--steps", "40", "--questions", "40"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert ran.returncode == 0, ran.stderr
    before, after = re.findall(r"trained  first ([\d.]+)  mean reciprocal rank ([\d.]+)", ran.stdout)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", ran.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    # One of eight answers comes first by chance; 40 questions of an untrained head differ from that by 0.05.
    assert float(before[0]) < 0.33 < float(after[0]), ran.stdout
    assert float(after[1]) > float(before[1])
