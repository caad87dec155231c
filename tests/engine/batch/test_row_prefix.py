"""`prefix`: a rollout that is cut anywhere and continued is the rollout that was never cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from rollout_server.rollout import FinishReason, GivenSpan, Prefix, Rollout, Wants
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

LENGTH = 20
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    "penalised": {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    "greedy": {"temperature": 0.0},
}


def prefix_of(token_ids: Sequence[int], **fields: Any) -> Prefix:
    """A prefix that came with nothing but its ids, but for `fields`."""
    count = len(token_ids)
    missing = (math.nan,) * count
    bare = Prefix(
        tuple(token_ids),
        missing,
        missing,
        (0,) * count,
        (GivenSpan(None, None, None, None, 0, count),) if count else (),
    )
    return replace(bare, **fields)


def cut(row: Rollout, at: int) -> Prefix:
    """What a client keeps of a row that was cut after `at` tokens."""
    spans = tuple(
        GivenSpan(s.version.name, s.version.number, s.version.digest, s.version.label, s.start, min(s.end, at))
        for s in row.spans
        if s.start < at
    )
    return Prefix(row.token_ids[:at], row.logprobs[:at], row.sampling_logprobs[:at], (1,) * at, spans)


@pytest.mark.parametrize("way", WAYS)
def test_cut_and_continued_is_uncut(base: Driver, way: str) -> None:
    (prompt,) = prompts_of([7], base.model.info.vocab_size)
    options = {"max_tokens": LENGTH, "seeds": [[4711]], "ignore_eos": True, **WAYS[way]}
    (whole,) = base.generate([prompt], **options)
    cuts = (1, 2, 9, LENGTH - 1)
    ids = [base.submit([prompt], prefix=cut(whole, at), **options) for at in cuts]
    base.finish(*ids)
    for at, id in zip(cuts, ids, strict=True):
        (row,) = base.rollouts(id)
        assert row.token_ids == whole.token_ids, at
        assert row.sampled == LENGTH - at
        assert row.logprobs[:at] == whole.logprobs[:at]
        assert_near(row.logprobs, whole.logprobs, TINY.of_row(whole))
        assert_near(row.sampling_logprobs, whole.sampling_logprobs, TINY.of_row(whole))
        assert all(map(math.isnan, row.log_kept_mass[:at]))
        assert [(span.start, span.end, span.kv) for span in row.spans] == [(at, LENGTH, "recomputed")]


def test_many_lengths_share_a_batch(base: Driver) -> None:
    prompts = prompts_of([3, 70, 12], base.model.info.vocab_size)
    options = {"max_tokens": LENGTH, "ignore_eos": True, "n": 3}
    whole = base.generate(prompts, seed=5, **options)
    seeds = [[row.seed for row in whole if row.prompt_index == index] for index in range(3)]
    ids = []
    for row in whole:
        at = 2 + 5 * row.sample_index
        ids.append(
            base.submit([row.prompt_ids], prefix=cut(row, at), seeds=[[seeds[row.prompt_index][row.sample_index]]],
                        **{**options, "n": 1})
        )  # fmt: skip
    base.finish(*ids)
    assert [base.rollouts(id)[0].token_ids for id in ids] == [row.token_ids for row in whole]


def test_what_was_not_given_is_missing(base: Driver) -> None:
    (prompt,) = prompts_of([5], base.model.info.vocab_size)
    wants = Wants(entropy=True, top_logprobs=2, prompt_logprobs=True, base_logprobs=True)
    rows = base.generate([prompt], n=3, max_tokens=9, ignore_eos=True, prefix=prefix_of([8, 9, 10]), wants=wants)
    assert len({row.token_ids for row in rows}) == 3
    for row in rows:
        assert row.token_ids[:3] == (8, 9, 10) and len(row.token_ids) == 9
        assert row.prompt_ids == tuple(prompt)
        for values in (row.logprobs, row.sampling_logprobs, row.log_kept_mass, row.entropy, row.base_logprobs):
            assert values is not None and len(values) == 9
            assert [math.isnan(value) for value in values] == [True] * 3 + [False] * 6
        assert row.top_logprobs is not None
        assert [top is None for top in row.top_logprobs] == [True] * 3 + [False] * 6
        assert row.prompt_logprobs is not None and len(row.prompt_logprobs) == len(prompt)


def test_values_are_those_of_teacher_forcing(driver: Driver) -> None:
    driver.push("policy", driver.bundle(1))
    (prompt,) = prompts_of([6], driver.model.info.vocab_size)
    (row,) = driver.generate(
        [prompt], policy="policy", max_tokens=12, ignore_eos=True, prefix=prefix_of([8, 9, 10, 11]),
        wants=Wants(base_logprobs=True),
    )  # fmt: skip
    sequence, start = [*prompt, *row.token_ids], len(prompt) + 4
    (own,) = driver.score([sequence], [start], policy="policy")
    (reference,) = driver.score([sequence], [start])
    assert_near(row.logprobs[4:], own.logprobs, TINY.of_row(row))
    assert row.base_logprobs is not None
    assert_near(row.base_logprobs[4:], reference.logprobs, TINY.of_logprobs(reference.logprobs, len(sequence)))
    assert max(abs(a - b) for a, b in zip(row.logprobs[4:], row.base_logprobs[4:], strict=True)) > 1e-3


def test_a_stop_string_may_begin_in_the_prefix(base: Driver) -> None:
    (prompt,) = prompts_of([5], base.model.info.vocab_size)
    options = {"max_tokens": LENGTH, "seeds": [[1]], "ignore_eos": True}
    (whole,) = base.generate([prompt], **options)
    tokenizer = base.model.tokenizer
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in whole.token_ids]
    stop = next(one[-1] + other for one, other in pairwise(pieces[4:]) if one and other)
    (stopped,) = base.generate([prompt], stop=(stop,), **options)
    cuts = range(1, len(stopped.token_ids))
    ids = [base.submit([prompt], stop=(stop,), prefix=cut(whole, place), **options) for place in cuts]
    base.finish(*ids)
    for id in ids:
        (row,) = base.rollouts(id)
        assert (row.token_ids, row.finish_reason, row.stop_reason) == (stopped.token_ids, FinishReason.STOP, stop)
    # one that is whole in the prefix stops nothing there
    longer = prefix_of(stopped.token_ids + whole.token_ids[:1])
    (row,) = base.generate([prompt], prefix=longer, stop=(stop,), **options)
    assert row.sampled > 0


def test_min_tokens_count_the_prefix(base: Driver) -> None:
    (prompt,) = prompts_of([5], base.model.info.vocab_size)
    everything = tuple(range(1, base.model.info.vocab_size))
    options = {"max_tokens": 10, "min_tokens": 5, "stop_token_ids": everything, "seeds": [[3]]}
    short, enough = (base.generate([prompt], prefix=prefix_of([7] * count), **options)[0] for count in (2, 5))
    assert short.token_ids[2:5] == (0, 0, 0) and len(short.token_ids) >= 6
    assert enough.finish_reason is FinishReason.STOP and enough.sampled <= 2


def test_a_row_that_never_ran_gives_its_prefix_back(base: Driver) -> None:
    base.set_max_rows(1)
    prompts = prompts_of([5, 5], base.model.info.vocab_size)
    id = base.submit(prompts, max_tokens=40, ignore_eos=True, prefix=prefix_of([8, 9]))
    base.until(lambda: base.status.tokens >= 3)
    base.abort(id)
    base.finish(id)
    first, second = base.rollouts(id)
    assert first.sampled >= 3
    assert (second.token_ids, second.sampled, second.spans) == ((8, 9), 0, ())


def test_a_prefix_alone_is_no_work(base: Driver) -> None:
    id = base.submit([[1, 2]], policy="base@sha256:00000000", prefix=prefix_of([8, 9]))
    base.until(lambda: base.over(id))
    assert base.error(id) is not None


def test_switching_over_a_prefix(driver: Driver) -> None:
    driver.push("policy", driver.bundle(1))
    (prompt,) = prompts_of([6], driver.model.info.vocab_size)
    id = driver.submit(
        [prompt], policy="policy", on_update="switch", max_tokens=30, ignore_eos=True, prefix=prefix_of([8, 9, 10])
    )
    driver.until(lambda: driver.status.tokens >= 4)
    driver.push("policy", driver.bundle(2))
    driver.finish(id)
    (row,) = driver.rollouts(id)
    first, second = row.spans
    assert (first.start, first.kv, second.end, second.kv) == (3, "recomputed", 30, "carried")
    assert first.end == second.start
