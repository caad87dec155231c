"""The example whose sampling and training overlap, as a user runs it, and what it promises of staleness."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from examples.async_grpo import CAP, Trainer, loss, train
from tests.examples.as_written import run_example
from tests.support.live_server import Server
from trainer_client import RolloutClient, truncated_importance_weights


@pytest.mark.long
@pytest.mark.parametrize("staleness", [0, 2])
def test_nothing_is_learned_from_that_is_further_behind(live: Server, staleness: int) -> None:
    """`train` asserts the bound of every token itself. How far behind one is depends on who is faster."""
    with RolloutClient(live.url) as client:
        updates = list(train(client, f"bounded-{staleness}", staleness, steps=4, prompts=4))
        (line,) = (line for line in client.weights() if line.name == f"bounded-{staleness}")
    assert len(updates) == 4 and line.live == 5, "every update was pushed"
    assert all(0 <= update.staleness <= min(step, staleness) for step, update in enumerate(updates))
    assert all(a.seconds < b.seconds for a, b in pairwise(updates))


def test_the_loss_weighs_as_the_client_does() -> None:
    """Its gradient by the log-probabilities is that of weights from `truncated_importance_weights`, held constant."""
    ids = mx.array([[1, 2, 3, 4], [2, 3, 4, 1]])
    mask, sampled = mx.array([[0, 0, 1, 1], [0, 1, 1, 0]]), mx.full((2, 4), -2.8)
    advantages = mx.array([1.0, -0.5])
    table = mx.random.normal((5, 5), key=mx.random.key(0))

    def model(table: mx.array) -> mx.array:
        return loss(lambda ids: table[ids], ids, mask, sampled, advantages)

    gradient = np.array(mx.grad(model)(table))
    rows = np.array(table, np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    expected = np.zeros_like(rows)
    weights_seen = []
    for row, column in np.argwhere(np.array(mask)):
        at, chosen = int(ids[row, column - 1]), int(ids[row, column])
        (weight,) = truncated_importance_weights([logprobs[at, chosen]], [-2.8], cap=CAP)
        weights_seen.append(weight)
        slope = np.eye(5)[chosen] - np.exp(logprobs[at])
        expected[at] -= weight * float(advantages[row]) * slope / int(mask.sum())
    assert max(weights_seen) == CAP and min(weights_seen) < CAP, "some are cut, and some are not"
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_both_loops_begin_with_the_same_weights() -> None:
    first, second = Trainer(0).weights, Trainer(0).weights
    assert all(mx.array_equal(first[name], second[name]) for name in first)


@pytest.mark.long
def test_the_example_says_when_each_loop_is_there(live: Server, tmp_path: Path) -> None:
    command = ["examples/async_grpo.py", "--url", live.url, "--steps", "2", "--prompts", "2"]
    command += ["--accuracy", "0.1", "--plot", str(tmp_path / "rewards.png")]
    ran = run_example(*command)
    assert ran.returncode == 0, ran.stderr
    steps = re.findall(r"staleness (\d)  step +(\d+) +[\d.]+ s  reward [\d.]+  (\d) behind", ran.stdout)
    assert [step[:2] for step in steps] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert all(behind <= most for most, _, behind in steps)
    assert len(re.findall(r"accuracy 0\.1 reached: [\d.]+ s", ran.stdout)) == 2, ran.stdout
    assert (tmp_path / "rewards.png").read_bytes().startswith(b"\x89PNG")
