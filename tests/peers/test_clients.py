"""The examples with litellm and verifiers, as a user runs them, against what the server says without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import rollout_server.demo
from rollout_server.demo.trainer.task import Style, held_out_problems
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server
from trainer_client import RolloutClient

ROOT = Path(__file__).parents[2]
DEMO = Path(rollout_server.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    """With `policy`, which answers unlike the base."""
    with live_server(None) as server:
        with RolloutClient(server.url) as trainer:
            layers = tiny_models.linear_layers(DEMO)
            trainer.push("policy", *tiny_models.random_adapter(layers, 4, seed=1, strength=0.2))
        yield server


def run(example: str, *options: str) -> str:
    """What the example prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_API_KEY": "none",
    }
    command = [sys.executable, f"examples/{example}.py", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    return ran.stdout


def answers(url: str, policy: str, questions: list[str]) -> list[str]:
    """Greedy replies to each question, asked without any library."""
    found = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        body = {"model": policy, "messages": messages, "temperature": 0, "max_tokens": 16}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        found.append(reply["choices"][0]["message"]["content"])
    return found


@pytest.mark.timeout(300)
def test_litellm_says_what_the_server_says(live: LiveServer) -> None:
    out = run("clients/litellm_calls", "--url", live.url, "--policy", "policy")
    (expected, *rest) = answers(live.url, "policy", ["17+25=", *(f"{number}+25=" for number in range(10, 14))])
    assert re.findall(r"^(?:whole|streamed): (.*), (\d+) tokens$", out, flags=re.MULTILINE) == [
        (repr(expected), count) for count in re.findall(r"^whole: .*, (\d+) tokens$", out, flags=re.MULTILINE) * 2
    ]
    assert re.findall(r"^together: (.*)$", out, flags=re.MULTILINE) == [repr(answer) for answer in rest]
    body = {"model": "policy", "prompt": ["17+25=", "4+4="], "max_tokens": 16, "temperature": 0, "logprobs": 1}
    plain = httpx.post(f"{live.url}/v1/completions", json=body).raise_for_status().json()
    found = re.findall(r"^completion: (.*), (\S+)$", out, flags=re.MULTILINE)
    assert [text for text, _ in found] == [repr(choice["text"]) for choice in plain["choices"]]
    sums = [sum(choice["logprobs"]["token_logprobs"]) for choice in plain["choices"]]
    assert np.allclose([float(value) for _, value in found], sums, atol=2e-3)
    assert "There is no policy 'nobody'" in out


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", ["base", "policy"])
def test_verifiers_scores_what_the_server_says(live: LiveServer, policy: str) -> None:
    out = run("clients/verifiers_sums", "--url", live.url, "--model", policy)
    problems = held_out_problems(16, seed=0)
    said = answers(live.url, policy, [problem.prompt for problem in problems])
    pairs = list(zip(problems, said, strict=True))
    reward = np.mean([text == problem.answer(Style.DIGITS) for problem, text in pairs])
    right = np.mean([str(problem.total) in re.findall(r"\d+", text) for problem, text in pairs])
    lines = [
        f"{name} turns, reward {reward:.2f}, right {right:.2f}"
        for name in ("one turn: 16 traces of 1.0", "three turns: 16 traces of 3.0")
    ]
    assert out.splitlines() == lines
    assert policy != "base" or 0 < reward < 1
