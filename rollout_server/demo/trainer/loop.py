"""The loop: push → sample groups → reward → compare log-probabilities → update, and again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer_client import PublishedVersion, RolloutBatch, RolloutClient

from .grpo import Packed, pack
from .policy import Policy
from .settings import Settings
from .task import Problem, lenient, reward, training_problems


@dataclass(frozen=True, slots=True)
class Sampled:
    """Rollouts of one version and what they are worth."""

    problems: tuple[Problem, ...]
    """[groups]"""
    batch: RolloutBatch
    packed: Packed
    rewards: np.ndarray
    """float32 [R]"""
    lenient: float
    """Share of rows with the right sum in any style."""
    seconds: float
    """From the request to the reply."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Trainer against server on N sampled tokens: d = the trainer's log-probability − the server's."""

    tokens: int
    max_abs_gap: float
    """max |d|, nats."""
    mean_abs_ratio_minus_one: float
    """mean |exp(d) − 1|."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of steps.jsonl. Rewards and agreement are of the rollouts sampled in this step, before its update."""

    step: int
    """From 1."""
    version: int
    reward: float
    lenient: float
    max_abs_gap: float
    mean_abs_ratio_minus_one: float
    tokens: int
    push_ms: float | None
    """None where nothing was pushed."""
    rollout_seconds: float
    seconds: float
    """The whole step."""


def publish(settings: Settings, client: RolloutClient, policy: Policy, label: str) -> tuple[PublishedVersion, float]:
    """Pushes the policy's weights; also the milliseconds until the server said that they are live."""
    started = time.perf_counter()
    version = client.push(settings.policy, policy.tensors, policy.config, label=label)
    return version, (time.perf_counter() - started) * 1e3


def sample(
    settings: Settings,
    client: RolloutClient,
    policy: Policy,
    version: PublishedVersion,
    problems: list[Problem],
    seed: int,
) -> Sampled:
    """One group of rollouts per problem, at temperature 1 without filters, so `logprobs` is what was sampled from.

    Raises `NotSynced` unless every token is of `version`."""
    started = time.perf_counter()
    batch = client.rollouts(
        [problem.prompt for problem in problems],
        policy=settings.policy,
        n=settings.samples,
        max_tokens=settings.max_tokens,
        temperature=1.0,
        seed=seed,
    )
    seconds = time.perf_counter() - started
    batch.assert_synced(version)
    if not batch.complete:
        raise RuntimeError(f"Rollouts did not end: their finish reasons are {sorted(set(batch.finish_reasons))}.")
    asked = [problems[index] for index in batch.prompt_index]
    answers = [policy.answer(row.token_ids, row.finish_reason) for row in batch]
    rewards = [reward(problem, *answer) for problem, answer in zip(asked, answers, strict=True)]
    right = [lenient(problem, text) for problem, (text, _) in zip(asked, answers, strict=True)]
    return Sampled(
        problems=tuple(problems),
        batch=batch,
        packed=pack(batch),
        rewards=np.array(rewards, np.float32),
        lenient=float(np.mean(right)),
        seconds=seconds,
    )


def compare(policy: Policy, sampled: Sampled) -> Agreement:
    """Recomputes every sampled token's log-probability under the trainer's weights as they are now."""
    difference = policy.logprobs(sampled.packed).astype(np.float64) - sampled.batch.logprobs
    return Agreement(
        tokens=len(difference),
        max_abs_gap=float(np.abs(difference).max()),
        mean_abs_ratio_minus_one=float(np.abs(np.expm1(difference)).mean()),
    )


def train(settings: Settings, client: RolloutClient, policy: Policy, report: Callable[[Step], None]) -> None:
    """`settings.steps` steps; `report` is called after each. The last update is left for the caller to publish."""
    draw = random.Random(settings.seed)
    problems = training_problems()
    version = None
    for number in range(1, settings.steps + 1):
        started = time.perf_counter()
        push_ms = None
        if version is None or settings.push:
            version, push_ms = publish(settings, client, policy, f"step-{number}")
        chosen = draw.sample(problems, settings.prompts)
        sampled = sample(settings, client, policy, version, chosen, seed=draw.getrandbits(48))
        agreement = compare(policy, sampled)
        advantages = sampled.batch.advantages(sampled.rewards)
        policy.update(sampled.packed, sampled.batch.per_token(advantages))
        report(
            Step(
                step=number,
                version=version.version,
                reward=float(sampled.rewards.mean()),
                lenient=sampled.lenient,
                max_abs_gap=agreement.max_abs_gap,
                mean_abs_ratio_minus_one=agreement.mean_abs_ratio_minus_one,
                tokens=agreement.tokens,
                push_ms=push_ms,
                rollout_seconds=sampled.seconds,
                seconds=time.perf_counter() - started,
            )
        )
