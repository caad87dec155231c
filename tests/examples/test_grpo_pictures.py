"""The example with pictures, as a user runs it: its model is made, served and trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.as_written import run_example
from tests.support.live_server import live_server


def run(*command: str) -> str:
    ran = run_example(*command, timeout_s=900)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.long
@pytest.mark.timeout(1_200)
def test_a_tiny_model_learns_to_name_what_it_sees(tmp_path: Path) -> None:
    made = run("examples/pictures/tiny_model.py", str(tmp_path), "--steps", "200")
    assert len(re.findall(r"loss [\d.]+", made)) == 10
    with live_server(tmp_path) as live:
        told = run("examples/pictures/grpo_pictures.py", str(tmp_path), "--url", live.url, "--steps", "24")
    rewards = [float(reward) for reward in re.findall(r"reward ([\d.]+)", told)]
    assert len(rewards) == 24
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1, "the reward rises"
