"""The example with PyTorch and PEFT, as a user runs it: a server in one process, the trainer in another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.live_server import live_server

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("options", "count"), [((), 11), (("--dora",), 4)], ids=["lora", "dora"])
def test_the_reward_rises_and_torch_agrees_with_every_token(options: tuple[str, ...], count: int) -> None:
    with live_server(None) as server:
        command = [sys.executable, "examples/peft_grpo.py", "--url", server.url, "--steps", str(count), *options]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000, check=False, env=QUIET)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = re.findall(r"step +(\d+)  peft-policy@(\d+)  reward ([\d.]+)  gap (\S+)", ran.stdout)
    assert [(int(step), int(version)) for step, version, *_ in steps] == [(k, k + 1) for k in range(count)]
    assert max(float(gap) for *_, gap in steps) < 1e-3
    rewards = [float(reward) for *_, reward, _ in steps]
    if count > 10:
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


QUIET = {
    "PATH": "/usr/bin:/bin",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    # two runtimes of threads that spin while they wait stand still on a machine with few cores
    "OMP_WAIT_POLICY": "PASSIVE",
}
