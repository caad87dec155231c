"""Drawn frequencies against the exact filtered distribution, and the three numbers a trainer relies on."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import chdtrc

from rollout_server.engine.sampling.numerics import exponential, exponentials_of, peak_of
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
from rollout_server.rollout import SamplingParams
from tests.laws.grids import some_long
from tests.support.numbers.bounds import of_softmax

DRAWS = 24_000
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "top_p_hot": {"top_p": 0.9, "temperature": 2.0},
    "min_p": {"min_p": 0.08},
    "mix": {"temperature": 1.3, "top_k": 30, "top_p": 0.85, "min_p": 0.05},
    "all but one": {"top_p": 1e-6},
}


def exact(logits: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """The definition, step by step, in float64: temperature, top-k, top-p, min-p, each renormalised."""
    scaled = logits / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    if params.top_k:
        p[p < np.sort(p)[-params.top_k]] = 0
        p /= p.sum()
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= params.top_p]] = 0
        p /= p.sum()
    if params.min_p:
        p[p < params.min_p * p.max()] = 0
        p /= p.sum()
    return p


def p_value(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Chi-square, with cells of fewer than 5 expected draws taken together."""
    expected = expected * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token outside the distribution was drawn"
    big = expected >= 5
    observed, wanted = list(counts[big]), list(expected[big])
    if expected[~big].sum() > 0:
        observed.append(counts[~big].sum())
        wanted.append(expected[~big].sum())
    if len(wanted) < 2:
        return 1.0
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    return float(chdtrc(len(wanted) - 1, statistic))


def logits_of(vocabulary: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(vocabulary) * 2.5).astype(np.float32)


@pytest.mark.parametrize("vocabulary", some_long([100, 301, 512, 2100], 301))
def test_drawn_frequencies_match_the_exact_distribution(vocabulary: int) -> None:
    """All settings share each batch, as rows of different requests do. One, two and three levels of blocks; the last
    block of 301 and of 2,100 is not full."""
    logits, copies, draws = logits_of(vocabulary), 100, DRAWS // (4 if vocabulary > 1000 else 1)
    params = [SamplingParams(max_tokens=1, **kwargs) for kwargs in SETTINGS.values()]
    rows = len(params) * copies
    arrays = prepare(params * copies, vocabulary, entropy=False, top_logprobs=0)
    counts = np.zeros((len(params), vocabulary), dtype=np.int64)
    batch = mx.array(np.tile(logits, (rows, 1)))
    for draw in range(draws // copies):
        ids = np.array(sample(batch, arrays, mx.array(uniforms(range(rows), [draw] * rows))).ids)
        np.add.at(counts, (np.arange(rows) % len(params), ids), 1)
    assert (counts.sum(axis=1) == draws).all()
    for row, (name, setting) in enumerate(zip(SETTINGS, params, strict=True)):
        p = p_value(counts[row], exact(logits.astype(np.float64), setting))
        assert p > 1e-4 / (2 * len(params)), (name, p)


@pytest.mark.long
def test_the_tail_is_drawn_as_often_as_it_should_be() -> None:
    """A hundred thousand tokens that together have 2 % of the mass: one float32 uniform could not reach them all."""
    vocabulary, rows = 131_072, 64
    logits = np.zeros(vocabulary, dtype=np.float32)
    logits[0] = math.log(0.98 / 0.02 * (vocabulary - 1))
    params = [SamplingParams(max_tokens=1)] * rows
    arrays = prepare(params, vocabulary, entropy=False, top_logprobs=0)
    one = mx.broadcast_to(mx.array(logits), (rows, vocabulary))
    drawn = [np.array(sample(one, arrays, mx.array(uniforms(range(rows), [k] * rows))).ids) for k in range(24)]
    ids = np.concatenate(drawn)
    tail = ids[ids > 0]
    assert abs(len(tail) / len(ids) - 0.02) < 5 * math.sqrt(0.02 * 0.98 / len(ids))
    halves = np.histogram(tail, bins=4, range=(1, vocabulary))[0]
    assert chdtrc(3, ((halves - len(tail) / 4) ** 2 / (len(tail) / 4)).sum()) > 1e-4


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_reported_numbers_are_those_of_the_definition(name: str) -> None:
    vocabulary = 512
    logits = logits_of(vocabulary, seed=3)
    params = SamplingParams(max_tokens=1, **SETTINGS[name])
    plain = SamplingParams(max_tokens=1)
    arrays = prepare([params, plain, None], vocabulary, entropy=True, top_logprobs=5)
    wide = logits.astype(np.float64)
    raw = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    tempered = wide / params.temperature
    tempered -= tempered.max() + np.log(np.exp(tempered - tempered.max()).sum())
    final = exact(wide, params)
    within = of_softmax(wide / min(1.0, params.temperature or 1.0))
    for draw in range(50):
        out = sample(mx.array(np.tile(logits, (3, 1))), arrays, mx.array(uniforms([draw] * 3, [0] * 3)))
        token = int(out.ids[0])
        logprob, sampling, kept, entropy = np.array(out.values)[:, 0]
        assert abs(logprob - raw[token]) < within
        assert abs(sampling - math.log(final[token])) < within
        assert abs(sampling + kept - tempered[token]) < within
        assert kept <= 0 and (kept == 0 if not params.filtered else True)
        assert abs(entropy + (np.exp(raw) * raw).sum()) < within
        assert np.array(out.top_ids)[0].tolist() == np.argsort(-wide)[:5].tolist()
        np.testing.assert_allclose(np.array(out.top_logprobs)[0], np.sort(raw)[::-1][:5], atol=within, rtol=0)


def test_greedy_takes_the_best_and_has_probability_one() -> None:
    logits = logits_of(512)
    arrays = prepare(
        [SamplingParams(max_tokens=1, temperature=0), SamplingParams(max_tokens=1)], 512, entropy=False, top_logprobs=0
    )
    out = sample(mx.array(np.tile(logits, (2, 1))), arrays, mx.array(uniforms([1, 2], [0, 0])))
    assert int(out.ids[0]) == int(logits.argmax())
    assert float(out.values[1, 0]) == 0.0 and math.isnan(float(out.values[2, 0]))
    assert float(out.values[2, 1]) == 0.0


def test_top_p_below_the_best_token_keeps_it_and_ties_are_kept_together() -> None:
    logits = np.full(64, -3.0, dtype=np.float32)
    logits[[5, 9]] = 4.0
    params = SamplingParams(max_tokens=1, top_p=0.3)
    arrays = prepare([params], 64, entropy=False, top_logprobs=0)
    ids = {int(sample(mx.array(logits[None]), arrays, mx.array(uniforms([s], [0]))).ids[0]) for s in range(64)}
    assert ids == {5, 9}


def test_banned_tokens_leave_the_sampling_distribution_only() -> None:
    logits = logits_of(128)
    best = int(logits.argmax())
    arrays = prepare(
        [SamplingParams(max_tokens=1, temperature=0), SamplingParams(max_tokens=1)], 128, entropy=False, top_logprobs=0
    )
    banned = (mx.array([0, 1]), mx.array([best, best]))
    wide = logits.astype(np.float64)
    raw = wide - np.log(np.exp(wide).sum())
    rest = np.delete(wide, best)
    for seed in range(40):
        out = sample(mx.array(np.tile(logits, (2, 1))), arrays, mx.array(uniforms([seed] * 2, [0, 0])), banned)
        token = int(out.ids[1])
        assert best not in (int(out.ids[0]), token)
        assert abs(float(out.values[0, 1]) - raw[token]) < of_softmax(wide)
        assert abs(float(out.values[1, 1]) - (wide[token] - np.log(np.exp(rest).sum()))) < of_softmax(wide)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    first = uniforms([7, 8, 9], [0, 5, 2**20])
    assert np.array_equal(first[1], uniforms([8], [5])[0])
    assert first.min() >= 0 and first.max() <= 1 - 2**-23
    many = uniforms(range(20_000), [3] * 20_000)
    assert abs(many.mean() - 0.5) < 0.01 and abs(np.corrcoef(many.T)[0, 1]) < 0.03
    along = uniforms([1] * 20_000, range(20_000))
    assert abs(np.corrcoef(along[:-1, 0], along[1:, 0])[0, 1]) < 0.03


def test_non_finite_logits_give_non_finite_logprobs() -> None:
    logits = np.tile(logits_of(128), (3, 1))
    logits[0, 3], logits[1, 3] = np.nan, np.inf
    arrays = prepare([SamplingParams(max_tokens=1)] * 3, 128, entropy=False, top_logprobs=0)
    values = np.array(sample(mx.array(logits), arrays, mx.array(uniforms([1, 2, 3], [0] * 3))).values)
    assert not np.isfinite(values[0, 0]) and not np.isfinite(values[0, 1]) and np.isfinite(values[0, 2])


def test_minus_infinity_is_a_token_that_is_never_drawn() -> None:
    logits = np.full((1, 128), -np.inf, dtype=np.float32)
    logits[0, :3] = [0.0, 1.0, 2.0]
    arrays = prepare([SamplingParams(max_tokens=1)], 128, entropy=True, top_logprobs=0)
    ids = set()
    for seed in range(100):
        out = sample(mx.array(logits), arrays, mx.array(uniforms([seed], [0])))
        ids.add(int(out.ids[0]))
        assert np.isfinite(np.array(out.values)).all()
    assert ids == {0, 1, 2}


def test_the_exponential_is_as_good_as_mlx_s_own() -> None:
    x = -np.random.default_rng(0).exponential(20, size=50_000).astype(np.float32)
    exact_values = np.exp(x.astype(np.float64))
    mine = np.array(exponential(mx.array(x)), dtype=np.float64)
    normal = exact_values > 1e-30
    assert np.max(np.abs(mine[normal] / exact_values[normal] - 1)) < 8e-6
    near = x > -4
    assert np.max(np.abs(mine[near] / exact_values[near] - 1)) < 6e-7
    edge = np.array(exponential(mx.array([0.0, -200.0, -np.inf], dtype=mx.float32)))
    assert edge.tolist() == [1.0, 0.0, 0.0]


def test_a_large_vocabulary_keeps_its_last_digits() -> None:
    """One float32 sum over 152k exponentials would be off by 2e-4 nat."""
    logits = (np.random.default_rng(5).standard_normal((4, 151_936)) * 2).astype(np.float32)
    arrays = prepare([SamplingParams(max_tokens=1)] * 4, 151_936, entropy=True, top_logprobs=0)
    out = sample(mx.array(logits), arrays, mx.array(uniforms(range(4), [0] * 4)))
    wide = logits.astype(np.float64)
    raw = wide - wide.max(axis=1, keepdims=True)
    raw -= np.log(np.exp(raw).sum(axis=1, keepdims=True))
    values = np.array(out.values)
    np.testing.assert_allclose(values[0], raw[np.arange(4), np.array(out.ids)], atol=of_softmax(wide), rtol=0)
    np.testing.assert_allclose(values[3], -(np.exp(raw) * raw).sum(axis=1), atol=2 * of_softmax(wide), rtol=0)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-3])
def test_short_logits_are_sampled_as_their_float32(dtype: mx.Dtype, temperature: float) -> None:
    """To the last bit: they are cast late, and the peak is found before."""
    settings = ({}, {"top_p": 0.9}, {"top_k": 7, "min_p": 0.01}, {"logit_bias": ((3, 2.0),)})
    params = [SamplingParams(max_tokens=1, temperature=temperature, **setting) for setting in settings]
    logits = (5 * mx.random.normal((len(params), 5003), key=mx.random.key(3))).astype(dtype)
    arrays, draws = prepare(params, 5003, entropy=True, top_logprobs=4), mx.array(uniforms(range(4), [2] * 4))
    for one, other in zip(
        sample(logits, arrays, draws).arrays(), sample(logits.astype(mx.float32), arrays, draws).arrays(), strict=True
    ):
        assert np.array_equal(np.array(one), np.array(other))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_exponentials_of_one_kernel_are_those_of_their_parts(dtype: mx.Dtype) -> None:
    """To the last bit, on this device: the scorer computes them part by part."""
    logits = (5 * mx.random.normal((3, 5003), key=mx.random.key(4))).astype(dtype)
    peak = peak_of(logits).astype(mx.float32)
    parts = exponential(logits.astype(mx.float32) - peak)
    assert np.array_equal(np.array(exponentials_of(logits, peak)), np.array(parts))
