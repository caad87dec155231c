"""What the filters mean, in numpy and float64: by how much each token stays. `filters` computes the same set on the
device; what checks it, what explains a replay, and what tells a client of the tokens that are left ask here."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rollout_server.rollout import SamplingParams

EXAMPLES = (
    SamplingParams(max_tokens=1, temperature=0.7, top_p=0.9),
    SamplingParams(max_tokens=1, temperature=1.3, top_k=20),
    SamplingParams(max_tokens=1, min_p=0.05),
    SamplingParams(max_tokens=1, temperature=0.8, top_k=40, top_p=0.8, min_p=0.02),
)
"""Each filter alone and all of them together: what a check of the sampler has to try."""


def margins(ordered: NDArray[np.float64], sampling: SamplingParams, *, whole: bool = True) -> NDArray[np.float64]:
    """By how much each of descending weights [V] stays (negative: is removed), the least of what the filters say:
    nats for top-k and min-p, mass for top-p; infinite without filters.

    The filters apply in this order, each to what the one before left, renormalised. `whole=False` says that only the
    first weights of the vocabulary are given: their mass is unknown then, and what top-p removes is not told."""
    margin = np.full(len(ordered), np.inf)
    logs = np.log(np.maximum(ordered, 1e-300))
    mass, k = ordered.sum(), sampling.top_k
    if 0 < k < len(ordered):
        margin[:k] = logs[:k] - logs[k]
        # Tied with the last one that stays, it stays.
        tied = ordered[k:] == ordered[k - 1]
        margin[k:] = np.where(tied, 0.0, np.minimum(logs[k:] - logs[k - 1], -1e-300))
        mass = ordered[margin >= 0].sum()
    if sampling.top_p < 1 and whole:
        margin = np.minimum(margin, sampling.top_p - (np.cumsum(ordered) - ordered) / mass)
    if sampling.min_p > 0:
        margin = np.minimum(margin, logs - math.log(sampling.min_p) - logs[:1])
    return margin
