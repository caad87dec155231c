"""The most probable tokens of the distribution a row was sampled from, out of those of the model's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rollout_server.rollout import SamplingParams

ALL = 1 - 1e-6
"""Probability above which nothing is left, in float32."""


def processed_top(
    top: Sequence[tuple[int, float]], *, logprob: float, sampling_logprob: float, sampling: SamplingParams
) -> list[tuple[int, float]]:
    """(id, log-probability) under temperature, top-k, top-p and min-p, best first, without the tokens they removed.

    `top` are the most probable of the unmodified distribution; `logprob` and `sampling_logprob` are the sampled
    token's, whose difference is the normaliser. Every filter keeps a prefix of the ranking, and what is kept sums to
    one: so the prefix ends where the sum is reached. A greedy row leaves one token, of probability one.
    """
    if sampling.temperature == 0:
        return [(id, 0.0) for id, _ in top[:1]]
    shift = sampling_logprob - logprob / sampling.temperature
    kept: list[tuple[int, float]] = []
    mass = 0.0
    for id, value in top[: sampling.top_k or None]:
        processed = value / sampling.temperature + shift
        if sampling.min_p > 0 and kept and processed < kept[0][1] + math.log(sampling.min_p):
            break
        if sampling.filtered and mass >= ALL:
            break
        kept.append((id, processed))
        mass += math.exp(processed)
    return kept
