"""Rows are drawn again token for token: alone, later, in any batch; and what was changed is found where it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.margins import margins
from rollout_server.engine.sampling.numerics import FANOUT, MOST
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
from rollout_server.engine.scoring.replay import RowReplay, TokenRange, replay_tokens
from rollout_server.errors import UnknownPolicy, VersionGone
from rollout_server.rollout import PolicyAddress, Rollout, SamplingParams, SpanAddress, Wants
from tests.engine.scoring.test_reader import slow
from tests.laws.grids import some_long
from tests.support.engine.driver import Driver, prompts_of, recorded
from tests.support.numbers.bounds import TINY, of_softmax

MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"temperature": 1.5, "top_p": 0.95, "top_k": 50, "presence_penalty": 1.0},
    {"logit_bias": ((5, 3.0), (6, -100.0)), "min_tokens": 10, "stop_token_ids": (5,)},
]
LENGTH = 24


def mixed_rows(driver: Driver, policies: tuple[str, ...] = ("base",), length: int = LENGTH) -> list[Rollout]:
    """Two rows of every kind, all in one busy batch; they join one after another."""
    prompts = prompts_of([3, 9, 20, 5, 14, 8, 30], driver.model.info.vocab_size)
    ids = []
    for at, (prompt, sampling) in enumerate(zip(prompts, MIXED, strict=True)):
        given = {"max_tokens": length, "ignore_eos": True} | sampling
        ids.append(driver.submit([prompt], n=2, seed=50 + at, policy=policies[at % len(policies)], **given))
        driver.turn(2)
    driver.finish(*ids)
    return [row for id in ids for row in driver.rollouts(id)]


@pytest.mark.parametrize("family", some_long(["qwen3", "gemma3_text", "gemma2"], "qwen3", "gemma3_text"))
def test_rows_of_a_busy_mixed_batch_are_drawn_again_exactly(
    family: str, bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    driver = Driver.start(model_path(family), bare_model(family), max_batch=32, prefill_tokens=48)
    rows = mixed_rows(driver)
    assert len({row.sampling for row in rows}) == len(MIXED)
    for row, found in zip(rows, driver.replay(rows), strict=True):
        assert found.exact and found.first_difference is None and found.margin is None
        assert found.max_abs_logprob_difference is not None
        assert found.max_abs_logprob_difference <= TINY.of_row(row)


def test_both_readers_and_one_row_at_a_time_find_the_same(base: Driver, qwen: Path) -> None:
    rows = mixed_rows(base)
    rows[3] = replace(rows[3], token_ids=(*rows[3].token_ids[:7], 1, *rows[3].token_ids[8:]))
    together = base.replay(rows)
    assert [found.first_difference for found in together].count(None) == len(rows) - 1
    one_by_one = [slow_row for row in rows for slow_row in slow(Driver.start(qwen, base.model)).replay([row])]
    for row, found, expected in zip(rows, together, one_by_one, strict=True):
        assert found.first_difference == expected.first_difference
        # A share of the probability: its error is at most that of the log-probability.
        assert found.margin == pytest.approx(expected.margin, abs=TINY.of_row(row))


@pytest.mark.parametrize("kind", some_long(range(len(MIXED)), 0, 6))
def test_a_seed_reproduces_its_row_alone_and_later(kind: int, base: Driver, qwen: Path) -> None:
    """What `seed` with `n: 1` promises: neither neighbours nor the time of joining matter."""
    alone = Driver.start(qwen, base.model, max_batch=1)
    for row in mixed_rows(base)[2 * kind : 2 * kind + 2]:
        given = {"max_tokens": LENGTH, "ignore_eos": True} | MIXED[kind]
        (again,) = alone.generate([row.prompt_ids], seeds=[[row.seed]], **given)
        assert again.token_ids == row.token_ids and again.finish_reason == row.finish_reason
        assert alone.replay([again])[0].exact


def oracle_margin(driver: Driver, row: Rollout, at: int, token: int) -> float:
    """From a plain forward in float64, for a row without filters, penalties or bias."""
    ids = row.prompt_ids + row.token_ids[:at]
    logits = driver.model.forward(mx.array([ids], dtype=mx.int32), driver.model.make_caches())[0, -1]
    exact = np.array(logits.astype(mx.float32), dtype=np.float64) / row.sampling.temperature
    weights = np.exp(exact - exact.max())
    size = 1
    while math.ceil(len(weights) / size) > MOST:
        size *= FANOUT
    found, start, end = [], 0, len(weights)
    for uniform in uniforms([row.seed], [at])[0]:
        parts = np.array([weights[k : min(k + size, end)].sum() for k in range(start, end, size)])
        chosen = (token - start) // size
        low, high = parts[:chosen].sum() / parts.sum(), parts[: chosen + 1].sum() / parts.sum()
        found.append(0.0 if low <= uniform < high else min(abs(uniform - low), abs(uniform - high)))
        start, end = start + chosen * size, min(start + (chosen + 1) * size, end)
        if size == 1:
            break
        size //= FANOUT
    return max(found)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_margin_is_how_far_the_uniforms_would_have_to_move(temperature: float, base: Driver) -> None:
    (row,) = base.generate(prompts_of([9], 286), max_tokens=20, ignore_eos=True, temperature=temperature, seed=4)
    for at, token in ((0, 7), (5, 285), (19, 100), (12, row.token_ids[12] ^ 1)):
        changed = (*row.token_ids[:at], token, *row.token_ids[at + 1 :])
        (found,) = base.replay([replace(row, token_ids=changed)])
        assert found.first_difference == at and not found.exact
        margin = pytest.approx(oracle_margin(base, row, at, token), abs=TINY.of_row(row))
        assert found.margin == margin and found.margin > 0


def test_margins_of_greedy_filtered_and_forbidden_tokens(base: Driver) -> None:
    prompt = prompts_of([9], 286)

    def changed(token_of: Callable[[Rollout], int], **sampling: Any) -> tuple[Rollout, int, float | None]:
        (row,) = base.generate(prompt, max_tokens=8, ignore_eos=True, seed=2, wants=Wants(top_logprobs=286), **sampling)
        token = token_of(row)
        (found,) = base.replay([replace(row, token_ids=(*row.token_ids[:3], token, *row.token_ids[4:]))])
        assert found.first_difference == 3
        return row, token, found.margin

    def rank(place: int) -> Callable[[Rollout], int]:
        return lambda row: row.top_logprobs[3][place][0] if row.top_logprobs else -1

    def gap(row: Rollout, better: int, worse: int) -> float:
        assert row.top_logprobs is not None
        return row.top_logprobs[3][better][1] - row.top_logprobs[3][worse][1]

    row, _, margin = changed(rank(4), temperature=0.0)
    assert margin == pytest.approx(gap(row, 0, 4), abs=2 * TINY.of_row(row))
    row, _, margin = changed(rank(9), top_k=5, temperature=0.5)
    assert margin == pytest.approx(gap(row, 4, 9) / 0.5, abs=2 * TINY.of_row(row) / 0.5)
    _, _, margin = changed(lambda row: 11, min_tokens=8, stop_token_ids=(11,))
    assert margin is None, "it could not come at all"


@pytest.mark.parametrize(
    "sampling",
    some_long(
        [{"top_p": 0.6}, {"top_k": 7}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 30}],
        {"min_p": 0.3},
        {"top_p": 0.9, "top_k": 30},
    ),
    ids=str,
)
def test_a_filter_s_edge_explains_a_difference(sampling: dict[str, Any]) -> None:
    """The recorded row was drawn from a set with one token more or less, whose edge lies within rounding."""
    rng = np.random.default_rng(3)
    met = 0
    for seed in range(150):
        logits = np.sort(rng.normal(size=64)).astype(np.float32) * 2
        tokens = rng.permutation(64)
        logits = logits[tokens]
        params = SamplingParams(max_tokens=1, **sampling)
        weights = np.exp(np.float64(logits) - logits.max())
        ordered = np.argsort(-weights)
        slack = margins(weights[ordered], params)
        count = int((slack >= 0).sum())
        # what the sampler keeps is what the slack says
        arrays = prepare([params], 64, entropy=False, top_logprobs=0)
        drawn = mx.array(uniforms([seed], [0]))
        chosen = int(np.array(sample(mx.array(logits)[None], arrays, drawn).ids)[0])
        assert chosen in ordered[:count]
        for other in {count - 1, count + 1} - {0}:
            kept = mx.array(np.where(np.isin(np.arange(64), ordered[:other]), logits, -np.inf).astype(np.float32))[None]
            bare = prepare([SamplingParams(max_tokens=1)], 64, entropy=False, top_logprobs=0)
            recorded_id = int(np.array(sample(kept, bare, drawn).ids)[0])
            if recorded_id == chosen:
                continue
            met += 1
            row = RowReplay((1,), (recorded_id,), (True,), params, seed, frozenset())
            replay_tokens(mx.array(logits)[None], [TokenRange(row, 0, 0, 1)])
            edge = abs(slack[count - 1] if other < count else slack[count])
            assert row.difference == 0 and row.margin is not None and row.margin <= edge + of_softmax(logits)
    assert met > 3


def test_only_judged_tokens_count(base: Driver) -> None:
    (row,) = base.generate(prompts_of([9], 286), max_tokens=12, ignore_eos=True, seed=4, presence_penalty=1.0)
    tokens = (1, 2, *row.token_ids[:4], 3, 4)
    given = recorded(row, token_ids=tokens, logprobs=(0.0,) * len(tokens))
    spans = (replace(given.spans[0], end=len(tokens)),)
    masked = replace(given, spans=spans, judged=(False,) * len(tokens))
    assert base.replay([masked])[0] == base.replay([recorded(replace(row, token_ids=(), logprobs=(), spans=()))])[0]
    (found,) = base.replay([masked])
    assert found.exact and found.max_abs_logprob_difference is None
    # A continued row: what was given is read and counted, what was drawn after it is judged.
    prefix = (7, 8, 9)
    continued = prefix + row.token_ids[3:]
    judged = (False,) * 3 + (True,) * 9
    read = recorded(row, token_ids=continued, judged=judged, logprobs=(None,) * 12)
    (first,) = base.replay([read])
    assert first.max_abs_logprob_difference is None
    assert first.first_difference is None or first.first_difference >= 3


def test_a_switched_row_is_drawn_again_on_the_kv_it_had(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    (prompt,) = prompts_of([12], 286)
    id = driver.submit([prompt], n=2, policy="p", on_update="switch", max_tokens=60, ignore_eos=True, seed=9)
    driver.turn(20)
    driver.push("p", driver.bundle(2, dora=True))
    driver.turn(15)
    driver.push("p", driver.bundle(3))
    driver.finish(id)
    rows = driver.rollouts(id)
    assert [len(row.spans) for row in rows] == [3, 3]
    for row, found in zip(rows, driver.replay(rows), strict=True):
        assert found.exact and (found.max_abs_logprob_difference or 0) <= TINY.of_row(row)
    fresh = [recorded(row, spans=tuple(replace(s, kv="recomputed") for s in recorded(row).spans)) for row in rows]
    for found in driver.replay(fresh):
        assert (found.max_abs_logprob_difference or 0) > 1e-3, "this KV is another one"
    assert all(v.rows_in_use == 0 for policy in driver.status.policies for v in policy.versions)


def test_versions_are_found_by_digest_and_a_freed_one_is_gone(qwen: Path) -> None:
    driver = Driver.start(qwen, keep_versions=2)
    one, two = driver.bundle(1), driver.bundle(2)
    driver.push("p", one)
    rows = driver.generate(prompts_of([9], 286), policy="p", max_tokens=10, ignore_eos=True)
    driver.push("p", two)
    driver.push("p", one)
    driver.push("p", two)
    # p@1 was freed, but p@3 is the same weights.
    (found,) = driver.replay(rows)
    assert found.exact
    driver.push("p", driver.bundle(3))
    driver.push("p", driver.bundle(4))
    with pytest.raises(VersionGone):
        driver.replay(rows)
    foreign = recorded(rows[0], spans=(SpanAddress(PolicyAddress("p", 6), 0, 10, "sha256:" + "0" * 64),))
    with pytest.raises(UnknownPolicy, match="has the digest"):
        driver.replay([foreign])
    held = [v.rows_in_use for policy in driver.status.policies for v in policy.versions]
    assert held == [0] * len(held)


def test_the_sampling_parameters_are_those_of_the_row(base: Driver) -> None:
    (row,) = base.generate(prompts_of([9], 286), max_tokens=30, ignore_eos=True, seed=4)
    cold = replace(row, sampling=SamplingParams(max_tokens=30, temperature=0.2, ignore_eos=True))
    other = replace(row, seed=row.seed + 1)
    assert [found.exact for found in base.replay([row, cold, other])] == [True, False, False]
