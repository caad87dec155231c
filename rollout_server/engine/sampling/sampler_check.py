"""Does this device sample as it should? One call of the sampler with every filter in it, against numpy in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.sampling.margins import EXAMPLES, margins
from rollout_server.engine.sampling.numerics import FANOUT, MOST
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
from rollout_server.rollout import SamplingParams

BOUND = 1e-3
"""Nats. float32 sums over a vocabulary are off by 1e-5; a wrong row, a wrong filter or a wrong order by a tenth."""
BORDER = 8
"""One draw in so many may be another than numpy's: a uniform can fall between two roundings of one boundary."""
KINDS = (SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, temperature=0.0), *EXAMPLES)
Array = NDArray[np.float64]


def check_sampler(vocabulary: int, dtype: mx.Dtype, rows: int, kernel: FilterKernel | None = None) -> str | None:
    """What the sampler computes wrongly for `rows` rows of logits in the model's dtype; None if all is well. `kernel`
    filters, if there is one."""
    kinds = [KINDS[row % len(KINDS)] for row in range(max(rows, len(KINDS)))]
    logits = mx.array(3 * np.random.default_rng(0).standard_normal((len(kinds), vocabulary))).astype(dtype)
    uniform = uniforms(range(len(kinds)), [7] * len(kinds))
    arrays = prepare(kinds, vocabulary, entropy=True, top_logprobs=0, kernel=kernel)
    found = sample(logits, arrays, mx.array(uniform))
    mx.eval(found.arrays())
    ids, values = np.array(found.ids), np.array(found.values, dtype=np.float64)
    others = 0
    for row, (params, raw) in enumerate(zip(kinds, np.array(logits.astype(mx.float32), dtype=np.float64), strict=True)):
        token, given = int(ids[row]), values[:, row]
        if not 0 <= token < vocabulary:
            return f"row {row} got token {token} of {vocabulary}"
        drawn, expected, slack = _one(raw, params, uniform[row].astype(np.float64), token)
        others += drawn != token
        gap = np.abs(given - expected)
        # A greedy row has no kept mass.
        gap = gap[~np.isnan(expected)]
        if not (gap <= BOUND + slack).all():
            return f"row {row} ({params}) has values {given.tolist()} where numpy has {expected.tolist()}"
    if others > len(kinds) // BORDER:
        return f"{others} of {len(kinds)} rows drew another token than numpy draws from the same numbers"
    return None


def _one(raw: Array, params: SamplingParams, uniform: Array, token: int) -> tuple[int, Array, float]:
    """(The token to draw, [log-probability, sampling log-probability, log kept mass, entropy] of `token`, how much a
    token on the border of the kept set would change them), from one row's logits."""
    logprobs = raw - np.max(raw) - np.log(np.sum(np.exp(raw - np.max(raw))))
    entropy = -np.sum(np.exp(logprobs) * logprobs)
    if params.temperature == 0:
        return int(np.argmax(raw)), np.array([logprobs[token], 0.0, np.nan, entropy]), 0.0
    weights = np.exp((raw - np.max(raw)) / params.temperature)
    probabilities = weights / weights.sum()
    ordered = np.sort(probabilities)[::-1]
    least = float(ordered[margins(ordered, params) >= 0][-1]) * (1 - 1e-9)
    kept = np.where(probabilities >= least, probabilities, 0.0)
    mass = kept.sum()
    sampling = np.log(probabilities[token]) - np.log(mass)
    values = np.array([logprobs[token], sampling, np.log(mass), entropy])
    return _draw(kept, uniform), values, float(least / mass)


def _draw(weights: Array, uniform: Array) -> int:
    """Down the blocks of `numerics.pyramid`, a uniform for each level."""
    levels = [weights]
    while len(levels[-1]) > MOST:
        count = len(levels[-1])
        levels.append(np.pad(levels[-1], (0, -count % FANOUT)).reshape(-1, FANOUT).sum(axis=1))
    index = 0
    for level, number in zip(reversed(levels), uniform, strict=False):
        inside = level if level is levels[-1] else level[index * FANOUT : (index + 1) * FANOUT]
        running = np.cumsum(inside)
        at = int(np.argmax((running > number * running[-1]) & (inside > 0)))
        index = at if level is levels[-1] else index * FANOUT + at
    return index
