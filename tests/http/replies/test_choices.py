"""Alternatives of the distribution that a row was sampled from, against all of its probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rollout_server.http.replies.choices import processed_top
from rollout_server.rollout import SamplingParams


def filtered(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """log-probabilities after temperature, top-k, top-p, min-p, each renormalised; -inf where removed."""
    values = logits / sampling.temperature
    values = values - np.log(np.exp(values).sum())

    def keep(mask: np.ndarray) -> np.ndarray:
        kept = np.where(mask, values, -np.inf)
        return np.asarray(kept - np.log(np.exp(kept).sum()))

    order = np.argsort(-values)
    rank = np.argsort(order)
    if sampling.top_k:
        values = keep(rank < sampling.top_k)
    if sampling.top_p < 1:
        before = np.concatenate([[0], np.cumsum(np.exp(values[order]))[:-1]])
        values = keep(before[rank] < sampling.top_p)
    if sampling.min_p:
        values = keep(values >= values.max() + np.log(sampling.min_p))
    return values


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 4},
        {"top_p": 0.7},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_processed_alternatives_are_exact(given: dict[str, Any]) -> None:
    sampling = SamplingParams(max_tokens=1, **given)
    generator = np.random.default_rng(1)
    for _ in range(40):
        logits = generator.normal(scale=2.0, size=30)
        raw = logits - np.log(np.exp(logits).sum())
        exact = filtered(raw, sampling)
        drawn = int(generator.choice(30, p=np.exp(exact)))
        for count in (1, 3, 30):
            top = [(int(id), float(raw[id])) for id in np.argsort(-raw)[:count]]
            found = processed_top(
                top, logprob=float(raw[drawn]), sampling_logprob=float(exact[drawn]), sampling=sampling
            )
            expected = [(id, exact[id]) for id, _ in top if exact[id] > -np.inf]
            assert [id for id, _ in found] == [id for id, _ in expected]
            assert np.allclose([value for _, value in found], [value for _, value in expected], atol=1e-9)


def test_a_greedy_row_has_one_alternative() -> None:
    sampling = SamplingParams(max_tokens=1, temperature=0)
    assert processed_top([(5, -0.3), (6, -1.0)], logprob=-0.3, sampling_logprob=0.0, sampling=sampling) == [(5, 0.0)]
    assert processed_top([], logprob=-0.3, sampling_logprob=0.0, sampling=sampling) == []
