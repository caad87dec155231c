"""Our server doing a trainer's step: a push, then rollouts, through HTTP and `trainer_client`, into arrays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.servers.compared import our_server
from benchmarks.whole_job.job import Adapter, Job
from trainer_client import RolloutClient

POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of the push, 0 without one, and of the whole step."""

    push_s: float
    seconds: float


class Trainer:
    """Does steps at a server, on the base or on an adapter that it pushes first."""

    def __init__(self, client: RolloutClient, job: Job, adapter: Adapter | None) -> None:
        self._client = client
        self._job = job
        self._adapter = adapter

    def step(self, number: int) -> Step:
        """From before the first request until the arrays are there. Raises RuntimeError where tokens are missing."""
        prompts = self._job.ids(number)
        weights = None if self._adapter is None else self._adapter.trained()
        began = time.perf_counter()
        if weights is not None and self._adapter is not None:
            self._client.push(POLICY, weights, self._adapter.config)
        pushed = time.perf_counter()
        batch = self._client.rollouts(
            prompts,
            policy="base" if weights is None else POLICY,
            n=self._job.n,
            max_tokens=self._job.tokens,
            temperature=1.0,
            ignore_eos=True,
        )
        seconds = time.perf_counter() - began
        if len(batch.logprobs) != self._job.sampled:
            raise RuntimeError(f"{len(batch.logprobs)} tokens came where {self._job.sampled} were asked for.")
        return Step(pushed - began, seconds)


@contextmanager
def trainer(job: Job, adapter: Adapter | None, *options: str) -> Iterator[Trainer]:
    """A trainer at a server that has just started."""
    with our_server(job.model, *options) as url, RolloutClient(url, timeout_s=None) as client:
        yield Trainer(client, job, adapter)


def steps_of_a_start(job: Job, adapter: Adapter | None, first: int, count: int, *options: str) -> list[Step]:
    """The first `count` steps after a start; `first` numbers them, so that prompts of no two rounds are equal."""
    with trainer(job, adapter, *options) as one:
        return [one.step(first + number) for number in range(count)]
