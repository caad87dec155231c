"""The set that top-k, top-p and min-p leave, against a float64 sort; both searches, every grouping of rows."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from rollout_server.engine.sampling.filters import NARROW, bisect, descend, prepare_filters
from rollout_server.engine.sampling.numerics import block_sums, largest, peak_of
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
from rollout_server.rollout import SamplingParams
from tests.support.numbers.bounds import of_softmax

ROUNDING = 2e-6
"""Share of the whole mass that a float32 sum may be off by."""


def logits_of(kind: str, vocabulary: int, rows: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    normal = random.standard_normal((rows, vocabulary))
    made = {
        "flat": normal * 0.01,
        "random model": normal * 0.6,
        "wide": normal * 3,
        "peaked": normal * 2 + 25 * (random.random((rows, vocabulary)) < 5 / vocabulary),
        "equal": np.zeros((rows, vocabulary)),
        "few values": random.integers(0, 4, (rows, vocabulary)),
        "masked": np.where(random.random((rows, vocabulary)) < 0.7, -np.inf, normal),
    }
    return made[kind].astype(np.float32)


def limits(weights: NDArray[np.float64], params: SamplingParams, slack: float) -> NDArray[np.bool_]:
    """Which of one row's weights stay, by the definition, with `slack` added to the mass that top-p may reach."""
    values, counts = np.unique(weights, return_counts=True)
    values, counts = values[::-1], counts[::-1]
    before = np.cumsum(counts) - counts
    alive = before < params.top_k if params.top_k else np.ones(len(values), dtype=bool)
    share = np.where(alive, values * counts, 0) / (values * counts)[alive].sum()
    if params.top_p < 1:
        alive = alive & ((np.cumsum(share) - share < params.top_p + slack) | (before == 0))
    return weights >= max(values[alive].min(), params.min_p * values[0])


MIXED = [
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 0.37},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": NARROW, "top_p": 0.95, "min_p": 1e-3},
    {"top_k": NARROW + 1},
    {"top_k": 10**9},
    {"top_k": 2000, "top_p": 0.7},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-6, "top_p": 0.98},
    {},
    {"temperature": 0.0, "top_p": 0.5},
]


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("vocabulary", [301, 16_384])
@pytest.mark.parametrize("kind", ["flat", "random model", "wide", "peaked", "equal", "few values", "masked"])
def test_what_stays_is_what_the_definition_says(kind: str, vocabulary: int, narrow: bool) -> None:
    check(logits_of(kind, vocabulary, len(MIXED)), [SamplingParams(max_tokens=1, **kwargs) for kwargs in MIXED], narrow)


def test_what_stays_of_a_large_vocabulary() -> None:
    params = [SamplingParams(max_tokens=1, **kwargs) for kwargs in MIXED]
    check(logits_of("wide", 151_936, len(MIXED)), params, narrow=True)


@pytest.mark.parametrize("setting", MIXED, ids=str)
def test_a_batch_of_one_kind_of_row(setting: dict[str, float]) -> None:
    check(logits_of("random model", 2048, 3), [SamplingParams(max_tokens=1, **setting)] * 3, narrow=True)


def check(logits: NDArray[np.float32], params: list[SamplingParams], narrow: bool) -> None:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    filters = prepare_filters(params, logits.shape[1], narrow=narrow)
    given = mx.array(weights)
    if filters is None:
        assert not any(row.filtered for row in params)
        return
    found = np.array(filters.least(given, block_sums(given).sum(axis=-1, keepdims=True)))
    for row, param in enumerate(params):
        stays = weights[row] >= found[row]
        if not param.filtered:
            assert stays.all()
            continue
        wide = weights[row].astype(np.float64)
        least, most = limits(wide, param, -ROUNDING), limits(wide, param, ROUNDING)
        assert (stays >= least).all() and (stays <= most).all(), (param, stays.sum(), least.sum(), most.sum())
        assert stays.any()


@pytest.mark.parametrize("size", [1, 2, 300, 512, 513, 1000, 4096, 5003])
def test_both_searches_find_the_same_set(size: int) -> None:
    weights = np.random.default_rng(size).exponential(size=(6, size)).astype(np.float32)
    weights /= weights.max(axis=1, keepdims=True)
    weights[1] = np.round(weights[1], 1)
    given = mx.array(weights)
    # Sums of a power of two are exact, so the searches must agree to the last token.
    given = mx.round(given * 1024) / 1024
    weights = np.array(given)
    total = weights.sum(axis=1, keepdims=True)
    for share in (1e-6, 0.25, 0.5, 0.99, 1.0):
        goal = mx.array((total * share).astype(np.float32))
        one, other = descend(given, goal, by_rank=False), bisect(given, goal, by_rank=False)
        assert np.array_equal(weights >= np.array(one), weights >= np.array(other))
    for rank in {1, size // 2 or 1, size}:
        goal = mx.full((6, 1), float(rank))
        one, other = descend(given, goal, by_rank=True), bisect(given, goal, by_rank=True)
        assert np.array_equal(np.array(one)[:, 0], np.sort(weights)[:, ::-1][:, rank - 1])
        assert np.array_equal(weights >= np.array(one), weights >= np.array(other))


@pytest.mark.parametrize("size", [1, 7, 300, 5000, 16_384])
def test_the_largest_and_the_peak(size: int) -> None:
    values = np.random.default_rng(size).standard_normal((5, size)).astype(np.float32)
    values[2] = -np.inf
    values[2, size // 2] = 1.0
    assert np.array_equal(np.array(peak_of(mx.array(values)))[:, 0], values.max(axis=1))
    for k in sorted({1, min(5, size), min(50, size), size}):
        ids, found = (np.array(part) for part in largest(mx.array(values), k))
        assert np.array_equal(found, np.sort(values, axis=1)[:, ::-1][:, :k])
        assert np.array_equal(np.take_along_axis(values, ids, axis=1), found)
        assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("kind", ["flat", "random model", "peaked", "few values"])
def test_the_numbers_of_a_filtered_draw_are_those_of_what_stayed(kind: str) -> None:
    """sampling_logprobs and log_kept_mass are those of float64, over the set that the threshold left."""
    vocabulary = 16_384
    params = [SamplingParams(max_tokens=1, temperature=0.9, **kwargs) for kwargs in MIXED[:-1]]
    logits = logits_of(kind, vocabulary, len(params), seed=4)
    arrays = prepare(params, vocabulary, entropy=False, top_logprobs=0)
    wide = logits.astype(np.float64) / 0.9
    wide -= wide.max(axis=1, keepdims=True)
    tempered = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    within = of_softmax(logits / 0.9)
    # Sets that differ by tokens whose mass is below the rounding of a sum.
    bounds = []
    for row, param in enumerate(params):
        weights = np.exp(wide[row])
        sets = [limits(weights, param, slack) for slack in (-ROUNDING, ROUNDING)]
        masses = [math.log(weights[stays].sum() / weights.sum()) if param.filtered else 0.0 for stays in sets]
        bounds.append((*masses, sets[1] if param.filtered else np.ones(vocabulary, dtype=bool)))
    for draw in range(20):
        out = sample(mx.array(logits), arrays, mx.array(uniforms(range(len(params)), [draw] * len(params))))
        ids, values = np.array(out.ids), np.array(out.values)
        for row, (low, high, stays) in enumerate(bounds):
            assert low - within <= values[2, row] <= high + within, (params[row], values[2, row], low, high)
            assert abs(values[1, row] + values[2, row] - tempered[row, ids[row]]) < within
            assert stays[ids[row]]
            assert values[1, row] <= within and math.isfinite(values[1, row])
