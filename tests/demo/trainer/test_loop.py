"""The trainer against a real server: what it learns, what it must not learn, and what it notices."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout_server.demo.run import model_directory
from rollout_server.demo.trainer.evaluation import evaluate
from rollout_server.demo.trainer.loop import Step, compare, publish, sample, train
from rollout_server.demo.trainer.policy import Policy
from rollout_server.demo.trainer.report import GAP_LIMIT
from rollout_server.demo.trainer.settings import Settings
from rollout_server.demo.trainer.task import held_out_problems, training_problems
from trainer_client import NotSynced, RolloutClient


@pytest.fixture
def settings(server: str, tmp_path: Path) -> Settings:
    return Settings(url=server, model=model_directory(), output=tmp_path, prompts=16)


def steps_of(settings: Settings) -> list[Step]:
    steps: list[Step] = []
    with RolloutClient(settings.url) as client:
        train(settings, client, Policy(settings), steps.append)
    return steps


@pytest.mark.long
def test_the_reward_rises_and_trainer_and_server_agree(settings: Settings) -> None:
    steps = steps_of(replace(settings, policy="rising", steps=12, learning_rate=1e-3))
    assert [step.version for step in steps] == list(range(1, 13))
    assert np.mean([step.reward for step in steps[-3:]]) > np.mean([step.reward for step in steps[:3]]) + 0.15
    assert max(step.max_abs_gap for step in steps) <= GAP_LIMIT
    assert all(step.push_ms is not None and step.push_ms > 0 for step in steps)


@pytest.mark.long
def test_without_a_learning_rate_the_reward_stays_flat(settings: Settings) -> None:
    steps = steps_of(replace(settings, policy="flat", steps=6, learning_rate=0.0))
    # Equal weights have one digest: pushing them again makes no new version.
    assert {step.version for step in steps} == {1}
    rewards = np.array([step.reward for step in steps])
    # 128 rows a step at a reward near 0.3: 0.1 is more than three standard deviations of a mean over three steps.
    assert abs(rewards[3:].mean() - rewards[:3].mean()) < 0.1
    assert 0.2 < rewards.mean() < 0.5
    assert max(step.max_abs_gap for step in steps) <= GAP_LIMIT


@pytest.mark.long
def test_without_pushing_the_gap_shows_it(settings: Settings) -> None:
    steps = steps_of(replace(settings, policy="forgotten", steps=5, learning_rate=1e-3, push=False))
    assert steps[0].max_abs_gap <= GAP_LIMIT
    assert steps[-1].max_abs_gap > 1e-2
    assert steps[-1].mean_abs_ratio_minus_one > 1e-3
    assert [step.push_ms is None for step in steps] == [False, True, True, True, True]


def test_rollouts_of_another_version_are_refused(settings: Settings) -> None:
    settings = replace(settings, policy="moving", learning_rate=1e-3)
    policy = Policy(settings)
    problems = training_problems()[:4]
    with RolloutClient(settings.url) as client:
        old, _ = publish(settings, client, policy, "old")
        sampled = sample(settings, client, policy, old, problems, seed=1)
        assert compare(policy, sampled).max_abs_gap <= GAP_LIMIT
        policy.update(sampled.packed, np.ones(len(sampled.batch.token_ids), np.float32))
        new, _ = publish(settings, client, policy, "new")
        assert (old.version, new.version) == (1, 2)
        with pytest.raises(NotSynced):
            sample(settings, client, policy, old, problems, seed=1)


def test_the_base_is_evaluated_as_it_ships(settings: Settings) -> None:
    with RolloutClient(settings.url) as client:
        base = evaluate(client, "base", held_out_problems(200, seed=5), settings.max_tokens)
    assert base.accuracy <= 0.6
    assert base.lenient_accuracy >= 0.9
    assert all(base.ended)


def test_the_trainer_loads_nothing_of_the_server() -> None:
    folder = model_directory().parent
    script = (
        "import sys; import trainer.__main__;"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('rollout_server', 'adapters')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {script}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ran.stdout.strip() == "[]"
