"""The example with TRL's GRPOTrainer, as a user runs it: the server in one process, the trainer in another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from examples.clients.trl_grpo import Rollouts
from tests.support.live_server import live_server
from trainer_client import RolloutClient

ROOT = Path(__file__).parents[2]
STEPS = 14
LINE = r"step +(\d+)  trl-policy@(\d+)  reward ([\d.]+)  gap (\S+)  before (\S+)"


@pytest.mark.timeout(1200)
def test_the_reward_rises_and_every_batch_is_from_the_adapter_just_pushed(tmp_path: Path) -> None:
    with live_server(None) as server:
        ran = subprocess.run(
            [sys.executable, "examples/clients/trl_grpo.py", "--url", server.url, "--steps", str(STEPS)],
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


def test_a_push_that_did_nothing_ends_the_run() -> None:
    """The server samples with the adapter of the step before, as it would if the push were lost."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "rollout_server" / "demo" / "model", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    with live_server(None) as server, RolloutClient(server.url) as client:
        version = client.push("trl-policy", model)
        batch = client.rollouts(["17+25=", "4+4="], policy=version, n=4, max_tokens=8)
    rollouts = Rollouts(client, "trl-policy")
    rollouts.compare(model, batch)
    assert rollouts.gap <= 1e-3
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1e-3
    with pytest.raises(SystemExit, match="do not compute the same policy"):
        rollouts.compare(model, batch)
    assert rollouts.before <= 1e-3 < rollouts.gap
