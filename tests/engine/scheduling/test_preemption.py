"""KV memory at its limit: rows step aside and come back, and nobody can tell from what they return."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.messages.versions import Delete
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.grammars import Grammars
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.rollout import FinishReason
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.engine.scheduling.test_on_update import spans
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

CELLS = 4 * 96


def small(path: Path, model: ResidentModel, cells: int = CELLS, **options: Any) -> Driver:
    limit = cells * model.info.kv_bytes_per_token
    return Driver.start(path, replace(model, info=replace(model.info, kv_memory=limit)), **options)


def watched(driver: Driver, *ids: str) -> int:
    """Finishes requests; returns the most bytes of KV there were."""
    most = 0
    for _ in range(6000):
        if all(driver.over(id) for id in ids):
            return most
        driver.turn()
        most = max(most, driver.batches.nbytes)
    raise AssertionError(f"not over: {driver.status}")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"top_p": 0.9, "temperature": 1.2}, marks=pytest.mark.long),
        {"presence_penalty": 0.7, "repetition_penalty": 1.2},
        pytest.param({"stop": ("ab", "e")}, marks=pytest.mark.long),
    ],
    ids=["plain", "top_p", "penalties", "stop"],
)
def test_rows_that_step_aside_return_the_same(base: Driver, qwen: Path, options: dict[str, Any]) -> None:
    prompts = prompts_of([20, 5, 33, 12], 286)
    asked = {"n": 2, "seed": 4, "max_tokens": 80, "ignore_eos": True, **options}
    expected = base.generate(prompts, **asked)
    driver = small(qwen, base.model)
    id = driver.submit(prompts, **asked)
    most = watched(driver, id)
    rows = driver.rollouts(id)
    assert len(rows) == 8 and 0 < most <= CELLS * base.model.info.kv_bytes_per_token
    if "stop" not in options:
        assert driver.preemptions > 0
    for one, other in zip(expected, rows, strict=True):
        assert_same(one, other, tolerance(base, [one]))
        assert (one.finish_reason, one.spans) == (other.finish_reason, other.spans)
    assert not driver.batches.preempted


@pytest.mark.long
def test_joined_caches_step_aside_too(bare_model: Any, model_path: Any) -> None:
    model = bare_model("falcon_h1")
    free = Driver.start(model_path("falcon_h1"), model)
    prompts = prompts_of([20] * 5, model.info.vocab_size)
    expected = free.generate(prompts, seed=1, max_tokens=120, ignore_eos=True)
    limit = 3 * model.info.row_bytes(110)
    driver = Driver.start(model_path("falcon_h1"), replace(model, info=replace(model.info, kv_memory=limit)))
    id = driver.submit(prompts, seed=1, max_tokens=120, ignore_eos=True)
    assert watched(driver, id) <= limit and driver.preemptions > 0
    for one, other in zip(expected, driver.rollouts(id), strict=True):
        assert_same(one, other, tolerance(free, [one]))


def test_a_switched_row_is_read_again_span_by_span(driver: Driver) -> None:
    def run(driver: Driver) -> list[Any]:
        driver.push("p", driver.bundle(1))
        ask = {"policy": "p", "seed": 2, "max_tokens": 100, "ignore_eos": True, "on_update": "switch"}
        ids = [driver.submit([prompt], **ask) for prompt in prompts_of([25, 9, 14], 286)]
        driver.until(lambda: len(driver.batches.rows) == 3)
        driver.until(lambda: min(len(row.token_ids) for row in driver.batches.rows) == 12)
        driver.push("p", driver.bundle(2))
        watched(driver, *ids)
        rows = [driver.rollouts(id)[0] for id in ids]
        driver.turn(3)
        assert all(v.rows_in_use == 0 for v in driver.status.policies[0].versions)
        driver.change(Delete("", "p"))
        return rows

    expected = run(driver)
    driver.set_kv_limit(400)
    rows = run(driver)
    assert driver.preemptions > 0
    for one, other in zip(expected, rows, strict=True):
        assert [span[1:] for span in spans(one)] == [span[1:] for span in spans(other)]
        assert_same(one, other, TINY.of_row(one))


def test_a_row_whose_old_version_is_gone_says_that_it_was_read_again(driver: Driver, qwen: Path) -> None:
    tight = small(qwen, driver.model, 400)
    tight.push("p", tight.bundle(1))
    ask = {"policy": "p", "seed": 2, "max_tokens": 110, "ignore_eos": True, "on_update": "switch"}
    ids = [tight.submit([prompt], **ask) for prompt in prompts_of([25, 9, 14], 286)]
    tight.turn(12)
    tight.push("p", tight.bundle(2))
    tight.change(Delete("", "p", 1))
    watched(tight, *ids)
    rows = [tight.rollouts(id)[0] for id in ids]
    assert all(len(row.token_ids) == 110 for row in rows)
    kinds = [[span.kv for span in row.spans] for row in rows]
    assert any("recomputed" in kind for kind in kinds)
    for row in rows:
        if any(span.kv == "recomputed" for span in row.spans):
            last = row.spans[-1]
            (scored,) = tight.score([row.prompt_ids + row.token_ids], [len(row.prompt_ids)], policy="p")
            assert_near(row.logprobs[last.start :], scored.logprobs[last.start :], TINY.of_row(row))


@pytest.mark.long
def test_random_load_in_tiny_memory(base: Driver, qwen: Path) -> None:
    dice = random.Random(5)
    driver = small(qwen, base.model, 400, max_batch=16, prefill_tokens=64)
    asked, most = [], 0
    for number in range(10):
        length, tokens, n = dice.randrange(1, 90), dice.randrange(50, 130), dice.randrange(1, 4)
        prompt = prompts_of([length], 286, seed=number)
        id = driver.submit(prompt, n=n, seed=number, max_tokens=tokens, ignore_eos=True)
        asked.append((id, prompt, n, number, tokens))
        if number % 5 == 4:
            driver.abort(dice.choice(asked)[0])
        for _ in range(dice.randrange(1, 8)):
            driver.turn()
            most = max(most, driver.batches.nbytes)
    most = max(most, watched(driver, *(id for id, *_ in asked)))
    assert most <= 400 * base.model.info.kv_bytes_per_token
    assert driver.preemptions > 0
    for id, prompt, n, seed, tokens in asked[::3]:
        expected = base.generate(prompt, n=n, seed=seed, max_tokens=tokens, ignore_eos=True)
        for one, other in zip(expected, driver.rollouts(id), strict=True):
            if other.finish_reason is FinishReason.ABORTED:
                assert other.token_ids == one.token_ids[: len(other.token_ids)]
            else:
                assert_same(one, other, tolerance(base, [one]))
    driver.turn(2)
    assert not driver.batches.preempted and driver.batches.size == 0


def test_aborting_a_preempted_row_returns_what_it_has(base: Driver, qwen: Path) -> None:
    driver = small(qwen, base.model, 2 * 96)
    ids = [driver.submit([p], seed=1, max_tokens=100, ignore_eos=True) for p in prompts_of([20, 20, 20], 286)]
    driver.until(lambda: bool(driver.batches.preempted))
    row = driver.batches.preempted[-1]
    driver.abort(row.group.request.id)
    driver.finish(row.group.request.id, turns=2)
    (ended,) = driver.rollouts(row.group.request.id)
    assert ended.finish_reason is FinishReason.ABORTED and len(ended.token_ids) > 0
    driver.finish(*ids)


@pytest.mark.long
def test_rows_with_a_grammar_step_aside_where_they_are_in_it(base: Driver, qwen: Path) -> None:
    """A row comes back with its tokens; its grammar has been where they lead all the while."""
    info = base.model.info
    grammars = Grammars(base.model.host_tokenizer, info.vocab_size, info.eos_token_ids)
    nested = grammars.compile(Grammar(GrammarKind.REGEX, r"(\[[a-d]{3}\]){25,}"), "structured_outputs.regex")
    prompts = prompts_of([20, 5, 33, 12], 286)
    asked = {"seed": 4, "max_tokens": 110, "constraint": nested}
    expected = base.generate(prompts, **asked)
    driver = small(qwen, base.model, 2 * 96)
    id = driver.submit(prompts, **asked)
    watched(driver, id)
    assert driver.preemptions > 0
    for one, other in zip(expected, driver.rollouts(id), strict=True):
        assert one.token_ids == other.token_ids and one.finish_reason == other.finish_reason
        assert len(other.token_ids) > 100
    assert all(found.exact for found in driver.replay(driver.rollouts(id)))


def test_a_slot_that_another_version_had_is_no_sign_of_it(driver: Driver) -> None:
    """A row is read again in the slot that its first version had, which is there once more under another name, with
    what was kept of the same prompt."""
    driver.push("p", driver.bundle(1))
    elder = driver.submit(prompts_of([9], 286), max_tokens=400, ignore_eos=True)
    (prompt,) = prompts_of([40], 286)
    options = {"policy": "p", "max_tokens": 150, "ignore_eos": True, "on_update": "switch"}
    id = driver.submit([prompt], **options)
    driver.until(lambda: any(row.token_ids for row in driver.batches.rows if row.group.request.id == id))
    (row,) = (row for row in driver.batches.rows if row.group.request.id == id)
    first = row.placement

    def goes_on() -> None:
        count = len(row.token_ids) + 3
        driver.until(lambda: len(row.token_ids) > count)

    for number in (2, 3):
        driver.push("p", driver.bundle(number))
        goes_on()
        driver.change(Delete("", "p", number - 1))
        limit = driver.kv_limit
        driver.set_kv_limit(1)
        driver.until(lambda: row.evicted)
        driver.set_kv_limit(limit)
        goes_on()
    assert row.placement == first, "the slot was free"
    driver.push("p", driver.bundle(4))
    goes_on()
    driver.push("again", driver.bundle(1))
    driver.generate([prompt], policy="again", max_tokens=3)
    driver.settle()
    driver.batches.evict(row)
    driver.finish(id)
    # Replay looks for what a span's version was among those of its name.
    for number in (1, 2):
        driver.push("p", driver.bundle(number))
    (told,) = driver.rollouts(id)
    assert [span.kv for span in told.spans].count("recomputed") == 2
    (found,) = driver.replay([told])
    assert found.exact and (found.max_abs_logprob_difference or 0) <= TINY.of_row(told)
    driver.abort(elder)
