"""The example with a learned reward, as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.as_written import run_example
from tests.support.live_server import Server


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_policy_learns_what_the_reward_model_was_taught(live: Server, tmp_path: Path) -> None:
    plot = tmp_path / "curves.png"
    ran = run_example("examples/grpo_reward_model.py", "--url", live.url, "--steps", "8", "--plot", str(plot))
    assert ran.returncode == 0, ran.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", ran.stdout)]
    steps = [tuple(map(float, own)) for own in re.findall(r"reward ([\d.]+)  right ([\d.]+)", ran.stdout)]
    assert len(losses) == 30 and sum(losses[-3:]) < sum(losses[:3])
    assert len(steps) == 8
    for curve in zip(*steps, strict=True):
        # A mean of three batches of 256 rows in 32 groups strays by less than 0.04 if nothing is learnt.
        assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.08, "the reward rises, and so does what it stands for"
    assert plot.read_bytes().startswith(b"\x89PNG")
