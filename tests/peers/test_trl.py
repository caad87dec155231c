"""The example with TRL's GRPOTrainer, as a user runs it: the server in one process, the trainer in another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live_server import live_server

ROOT = Path(__file__).parents[2]
STEPS = 14
LINE = r"step +(\d+)  trl-policy@(\d+)  reward ([\d.]+)  gap (\S+)  before (\S+)"


@pytest.mark.timeout(1200)
def test_the_reward_rises_and_every_batch_is_from_the_adapter_just_pushed(tmp_path: Path) -> None:
    with live_server(None) as server:
        ran = subprocess.run(
            [sys.executable, "examples/trl_grpo.py", "--url", server.url, "--steps", str(STEPS)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1000,
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": str(tmp_path),
                "OMP_WAIT_POLICY": "PASSIVE",
            },
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = re.findall(LINE, ran.stdout)
    assert [(int(step), int(version)) for step, version, *_ in steps] == [(k, k + 1) for k in range(STEPS)]
    rewards = [float(reward) for _, _, reward, *_ in steps]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert max(float(gap) for *_, gap, _ in steps) <= 1e-3
    # One step earlier there was nothing to differ from: a fresh adapter changes nothing.
    assert min(float(before) for *_, before in steps[1:]) > 1e-3
