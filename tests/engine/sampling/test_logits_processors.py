"""Penalties, bias, held-back end tokens and masks against their formulas in float64, over whole rollouts.

The oracle reads a finished row again, token by token: from the logits of a teacher-forced pass it works out what the
distribution of every token must have been. A count that is one step late, or another row's, changes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.batch.step_inputs import TokenCounts
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.filters import RowSubset
from rollout_server.engine.sampling.logits_processors import prepare_bans
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
from rollout_server.errors import InvalidField
from rollout_server.rollout import PolicyAddress, PolicyVersion, Rollout, RolloutRequest, SamplingParams
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.engine.sampling.test_filters import limits
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near, of_softmax

SETTINGS: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7, "temperature": 0.8},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "top_p": 0.9},
    {"presence_penalty": -1.0, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "top_k": 20, "min_p": 0.01},
    {"logit_bias": ((7, 4.0), (9, 3.5), (11, -100.0))},
    {"logit_bias": ((3, 2.0),), "presence_penalty": 2.0, "min_tokens": 9, "stop_token_ids": (3, 5), "top_p": 0.95},
    {"temperature": 0.0, "frequency_penalty": 0.9, "presence_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.5, "logit_bias": ((4, 1.0),)},
    {"temperature": 0.0},
    {},
    {"min_tokens": 6, "stop_token_ids": (1, 2)},
]


def shaped(
    logits: NDArray[np.float64],
    prompt: tuple[int, ...],
    sampled: tuple[int, ...],
    params: SamplingParams,
    eos: set[int],
) -> NDArray[np.float64]:
    """Repetition as transformers' processor, frequency and presence as OpenAI writes them, then bias and bans."""
    logits = logits.copy()
    for token in set(prompt) | set(sampled):
        logits[token] *= params.repetition_penalty if logits[token] <= 0 else 1 / params.repetition_penalty
    for token in set(sampled):
        logits[token] -= params.frequency_penalty * sampled.count(token) + params.presence_penalty
    for token, value in params.logit_bias:
        logits[token] += value
    if len(sampled) < params.min_tokens:
        logits[list(set(params.stop_token_ids) | (set() if params.ignore_eos else eos))] = -math.inf
    return logits


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def check(driver: Driver, row: Rollout) -> None:
    """Every number of the row, and for greedy rows every token."""
    params = row.sampling
    within = 2 * tolerance(driver, [row]) / min(1.0, params.temperature or 1.0)
    tokens = mx.array([row.prompt_ids + row.token_ids], dtype=mx.int32)
    logits = np.array(driver.model.forward(tokens, driver.model.make_caches())[0], dtype=np.float64)
    for at, token in enumerate(row.token_ids):
        raw = logits[len(row.prompt_ids) - 1 + at]
        changed = shaped(raw, row.prompt_ids, row.token_ids[:at], params, set(driver.model.info.eos_token_ids))
        assert abs(row.logprobs[at] - log_softmax(raw)[token]) < within
        if params.temperature == 0:
            assert changed[token] >= changed.max() - within
            assert row.sampling_logprobs[at] == 0 and math.isnan(row.log_kept_mass[at])
            continue
        tempered = log_softmax(changed / params.temperature)
        assert abs(row.sampling_logprobs[at] + row.log_kept_mass[at] - tempered[token]) < within
        weights = np.exp(tempered - tempered.max())
        bounds = [np.log(weights[limits(weights, params, e)].sum() / weights.sum()) for e in (-1e-5, 1e-5)]
        assert bounds[0] - within <= row.log_kept_mass[at] <= bounds[1] + within


def test_mixed_rows_have_the_distribution_of_their_formulas(base: Driver) -> None:
    prompts = prompts_of([9, 3, 30, 12, 5, 17, 8, 2, 21, 4, 6, 10], 286, seed=1)
    ids = [
        base.submit([prompt], seed=index, max_tokens=24, **setting)
        for index, (prompt, setting) in enumerate(zip(prompts, SETTINGS, strict=True))
    ]
    base.finish(*ids)
    together = [base.rollouts(id)[0] for id in ids]
    for index, (row, setting) in enumerate(zip(together, SETTINGS, strict=True)):
        check(base, row)
        if "min_tokens" in setting:
            assert len(row.token_ids) >= setting["min_tokens"]
        if index % 3 == 0:
            alone = base.generate([prompts[index]], seed=index, max_tokens=24, **setting)[0]
            assert_same(alone, row, tolerance(base, [row]))
    assert any(len(set(row.token_ids)) < len(row.token_ids) for row in together), "nothing was ever repeated"


@pytest.mark.parametrize("family", ["qwen3", "granitemoehybrid"])
def test_counts_follow_rows_that_join_leave_and_move(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    model = bare_model(family)
    driver = Driver.start(model_path(family), model, max_batch=24)
    driver.policies.route(0, [0])
    penalised = {"presence_penalty": 0.5, "frequency_penalty": 0.6, "repetition_penalty": 1.3, "ignore_eos": True}
    prompts = prompts_of([6, 11, 3], model.info.vocab_size, seed=2)
    ids = [driver.submit([prompts[0]], seed=1, max_tokens=60, temperature=0.6, **penalised)]
    driver.turn(5)
    crowd = driver.submit(prompts_of([4] * 15, model.info.vocab_size), max_tokens=7, **penalised)
    plain = driver.submit(prompts_of([5] * 3, model.info.vocab_size), max_tokens=12)
    ids.append(driver.submit([prompts[1]], seed=2, max_tokens=50, temperature=0, **penalised))
    driver.turn(4)
    ids.append(driver.submit([prompts[2]], n=2, seed=3, max_tokens=40, **penalised))
    driver.turn(6)
    driver.abort(plain)
    driver.finish(crowd, *ids)
    rows = [row for id in (*ids, crowd) for row in driver.rollouts(id)]
    assert len(rows) == 4 + 15
    driver.policies.route(0, [0])
    for row in rows:
        check(driver, row)


def test_a_logit_bias_of_100_is_nearly_a_command_and_of_minus_100_nearly_a_ban(base: Driver) -> None:
    forced = base.generate([[1, 2, 3]], max_tokens=6, ignore_eos=True, logit_bias=((42, 100.0),))[0]
    assert forced.token_ids == (42,) * 6 and max(map(abs, forced.sampling_logprobs)) < 1e-6
    (told,) = base.score([forced.prompt_ids + forced.token_ids], [len(forced.prompt_ids)])
    assert_near(forced.logprobs, told.logprobs, TINY.of_row(forced))
    assert min(forced.logprobs) < -1, "the model's own, without the bias"
    never = base.generate(
        [[1, 2, 3]], n=4, max_tokens=20, ignore_eos=True, logit_bias=tuple((t, -100.0) for t in range(250))
    )
    assert all(token >= 250 for row in never for token in row.token_ids)


def row_of(params: SamplingParams, prompt: tuple[int, ...], tokens: list[int]) -> Row:
    request = RolloutRequest("r", prompt, params, PolicyAddress("base"), seeds=(0,))
    row = Row(Group(request), 0, 0, PolicyVersion("base", 0, "sha256:0"), 0, None)
    row.token_ids, row.dispatched = list(tokens), len(tokens)
    return row


def test_counts_start_with_the_tokens_a_row_already_has_and_follow_its_place() -> None:
    params = SamplingParams(max_tokens=50, frequency_penalty=0.5)
    one, two, plain = (
        row_of(p, (1, 2), t) for p, t in ((params, [5, 5]), (params, []), (replace(params, frequency_penalty=0.0), []))
    )
    counts = TokenCounts(8)
    counts.seat([None, plain])
    assert counts.seen is None
    counts.add(mx.array([1, 1]))
    counts.seat([one, plain, None, two])
    for ids in ([5, 7, 7, 3], [6, 7, 7, 3]):
        counts.add(mx.array(ids))
        for row, token in zip((one, plain, two), (ids[0], ids[1], ids[3]), strict=True):
            row.dispatched += 1
            row.token_ids.append(token)
    assert np.array(counts.seen).tolist() == [[0, 1, 1, 0, 0, 6, 2, 0], [0, 1, 1, 4, 0, 0, 0, 0]]
    # `two` moves, `one` leaves; then `one` comes back after it went on elsewhere.
    counts.seat([two])
    counts.add(mx.array([0]))
    two.dispatched += 1
    two.token_ids.append(0)
    one.token_ids.append(1)
    one.dispatched += 1
    counts.seat([None, one, two])
    assert np.array(counts.seen).tolist() == [[0, 3, 1, 0, 0, 6, 2, 0], [2, 1, 1, 4, 0, 0, 0, 0]]
    # It samples elsewhere while this batch does nothing.
    one.dispatched += 1
    one.token_ids.append(6)
    counts.seat([one])
    assert np.array(counts.seen).tolist() == [[0, 3, 1, 0, 0, 6, 4, 0]]
    one.dispatched += 1
    counts.seat([two])
    with pytest.raises(RuntimeError, match="in flight"):
        counts.seat([one, two])
    counts.seat([None])
    assert counts.seen is None


def test_end_tokens_are_held_back_row_by_row() -> None:
    rows = [
        SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=(4, 5)),
        None,
        SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=(6, 2), ignore_eos=True),
        SamplingParams(max_tokens=9, stop_token_ids=(7,)),
    ]
    bans = prepare_bans(rows, frozenset({2}))
    assert bans is not None and prepare_bans(rows[3:], frozenset({2})) is None

    def held(positions: list[int]) -> list[tuple[int, int]]:
        pairs = bans.at(positions)
        return [] if pairs is None else list(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))

    assert held([0, 0, 4, 0]) == [(0, 2), (0, 4), (0, 5), (2, 2), (2, 6)]
    assert held([3, 0, 4, 0]) == [(2, 2), (2, 6)]
    assert held([3, 0, 5, 0]) == []


@pytest.mark.parametrize("vocabulary", [64, 301])
def test_a_mask_leaves_only_its_tokens(vocabulary: int) -> None:
    """Bit t mod 32 of word t // 32; one allowed token is a forced one, whatever the filters."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((3, vocabulary)).astype(np.float32)
    allowed = np.zeros((3, -(-vocabulary // 32) * 32), dtype=bool)
    allowed[0, [1, 33, 40, 63]] = allowed[1, 31] = True
    allowed[2, :vocabulary] = True
    mask = mx.array(np.packbits(allowed, axis=1, bitorder="little").view(np.uint32))
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, top_p=0.9), SamplingParams(max_tokens=1)]
    arrays = prepare(params, vocabulary, entropy=False, top_logprobs=0)
    raw = log_softmax(logits[0].astype(np.float64))
    left = log_softmax(np.where(allowed[0, :vocabulary], logits[0], -np.inf).astype(np.float64))
    seen = set()
    for draw in range(200):
        out = sample(mx.array(logits), arrays, mx.array(uniforms([1, 2, 3], [draw] * 3)), mask=RowSubset(None, mask))
        ids, values = np.array(out.ids), np.array(out.values)
        seen.add(int(ids[0]))
        assert ids[1] == 31 and values[1, 1] == 0 and values[2, 1] == 0
        assert max(abs(values[0, 0] - raw[ids[0]]), abs(values[1, 0] - left[ids[0]])) < of_softmax(logits)
    assert seen == {1, 33, 40, 63}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias"),
    ],
)
def test_values_outside_their_domain_are_named(change: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidField) as raised:
        SamplingParams(max_tokens=1, **change)
    assert raised.value.param == name and raised.value.message.startswith(name)
