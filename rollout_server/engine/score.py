"""Teacher-forced log-probabilities of given tokens: the slow, obvious path the sampler is checked against.

One sequence at a time on mlx-lm's own caches, in chunks, so that memory does not grow with length × vocabulary.
Positions before `start` go through the model without its head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from adapters.resident import Placement
from rollout_server.engine.cache import Forward
from rollout_server.engine.exponentials import block_sums, exponential
from rollout_server.engine.messages import ScoredSequence
from rollout_server.engine.sampling import entropy_of, top_of
from rollout_server.engine.sequence import Group, TopTokens
from rollout_server.errors import NonFiniteLogits, RolloutError
from rollout_server.rollout import PolicyVersion

LOGIT_BYTES = 64 * 2**20
"""float32 logits alive at once."""


@dataclass(slots=True, eq=False)
class ScoreJob:
    """Sequences to score under one version, and how far it got."""

    id: str
    version: PolicyVersion
    placement: Placement
    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    temperature: float = 1.0
    entropy: bool = False
    top_logprobs: int = 0
    group: Group | None = field(kw_only=True, default=None)
    """The group whose prompt it scores; None for a request of its own."""
    finished: Callable[[tuple[ScoredSequence, ...]], None] = field(kw_only=True)
    """Called on the engine thread with the results."""
    failed: Callable[[RolloutError], None] = field(kw_only=True)
    results: list[ScoredSequence] = field(default_factory=list)
    fed: int = 0
    caches: list[Any] | None = None
    logprobs: list[float | None] = field(default_factory=list)
    entropies: list[float | None] = field(default_factory=list)
    tops: list[TopTokens | None] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.sequences)


class Scorer:
    """Feeds score jobs through the model, a bounded number of tokens at a time. Only the sequence it is at has
    caches."""

    def __init__(
        self,
        forward: Forward,
        make_caches: Callable[[], list[Any]],
        route: Callable[[int, Sequence[int]], None],
        vocabulary: int,
    ) -> None:
        self._forward = forward
        self._make_caches = make_caches
        self._route = route
        self._chunk = max(1, LOGIT_BYTES // (4 * vocabulary))

    def advance(self, job: ScoreJob, budget: int) -> int:
        """Feeds up to `budget` tokens of the job; returns how many it fed (at least one unless the job is done).

        Raises `NonFiniteLogits` if a log-probability is not a number."""
        used = 0
        while used < budget and not job.done:
            tokens, start = job.sequences[len(job.results)], job.starts[len(job.results)]
            if job.caches is None:
                job.caches = self._make_caches()
                if start == 0:
                    self._keep(job, None, None, None)
            used += self._feed(job, tokens, start, budget - used)
            if job.fed == len(tokens) - 1:
                self._close(job)
        return used

    def _feed(self, job: ScoreJob, tokens: tuple[int, ...], start: int, budget: int) -> int:
        first_scored = max(start, 1) - 1
        scored = job.fed >= first_scored
        end = min(len(tokens) - 1 if scored else first_scored, job.fed + budget)
        if scored:
            end = min(end, job.fed + self._chunk)
        n = end - job.fed
        if n <= 0:
            return 1
        self._route(job.placement.parameters, [job.placement.slot])
        logits = self._forward(mx.array([tokens[job.fed : end]], dtype=mx.int32), job.caches or [])
        if scored:
            self._read(job, logits[0], tokens[job.fed + 1 : end + 1])
        else:
            mx.eval([cache.state for cache in job.caches or []])
        job.fed = end
        return n

    def _read(self, job: ScoreJob, logits: mx.array, targets: tuple[int, ...]) -> None:
        raw = logits.astype(mx.float32) / job.temperature
        shifted = raw - mx.max(raw, axis=-1, keepdims=True)
        exponentials = exponential(shifted)
        log_total = mx.log(mx.sum(block_sums(exponentials), axis=-1, keepdims=True))
        chosen = (mx.take_along_axis(shifted, mx.array(targets, dtype=mx.int32)[:, None], axis=-1) - log_total)[:, 0]
        entropy = entropy_of(shifted, exponentials, log_total)
        wanted = [chosen] + ([entropy] if job.entropy else [])
        top = top_of(shifted, log_total, min(job.top_logprobs, raw.shape[-1])) if job.top_logprobs else None
        mx.eval(wanted, top, [cache.state for cache in job.caches or []])
        values = np.array(chosen).tolist()
        if any(math.isnan(value) for value in values):
            raise NonFiniteLogits(
                f"The model produced NaN or infinity while scoring under {job.version.name}@{job.version.number}."
            )
        entropies = np.array(entropy).tolist() if job.entropy else [None] * len(values)
        rows: list[TopTokens | None] = [None] * len(values)
        if top is not None:
            rows = [
                tuple(zip(ids, logs, strict=True))
                for ids, logs in zip(np.array(top[0]).tolist(), np.array(top[1]).tolist(), strict=True)
            ]
        for value, spread, best in zip(values, entropies, rows, strict=True):
            self._keep(job, value, spread, best)

    @staticmethod
    def _keep(job: ScoreJob, logprob: float | None, entropy: float | None, top: TopTokens | None) -> None:
        job.logprobs.append(logprob)
        job.entropies.append(entropy)
        job.tops.append(top)

    @staticmethod
    def _close(job: ScoreJob) -> None:
        job.results.append(
            ScoredSequence(
                tuple(job.logprobs),
                tuple(job.entropies) if job.entropy else None,
                tuple(job.tops) if job.top_logprobs else None,
            )
        )
        job.fed, job.caches = 0, None
        job.logprobs, job.entropies, job.tops = [], [], []
