"""`base_logprobs`: one pass a finished group under the base, beside running work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.errors import EngineFault
from rollout_server.rollout import FinishReason, Rollout, Wants
from tests.engine.batch.test_batch import tolerance
from tests.laws.grids import some_long
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, amplified, assert_near

BASE_TOO = Wants(base_logprobs=True)


def plain(driver: Driver, row: Rollout) -> np.ndarray:
    """log-softmax of one plain forward of the bare base."""
    driver.policies.route(0, [0])
    tokens = row.prompt_ids + row.token_ids
    logits = driver.model.forward(mx.array([tokens], dtype=mx.int32), driver.model.make_caches())[0].astype(mx.float32)
    values = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    start = len(row.prompt_ids)
    return np.array([values[start + k - 1, token] for k, token in enumerate(row.token_ids)])


def assert_base(driver: Driver, rows: list[Rollout], times: int = 1) -> None:
    within = times * tolerance(driver, rows)
    for row in rows:
        assert row.base_logprobs is not None and len(row.base_logprobs) == len(row.token_ids)
        assert_near(row.base_logprobs, plain(driver, row), within)
    scored = driver.score([r.prompt_ids + r.token_ids for r in rows], [len(r.prompt_ids) for r in rows])
    for row, score in zip(rows, scored, strict=True):
        assert_near(row.base_logprobs, score.logprobs, within)


def watch(driver: Driver) -> list[tuple[int, int]]:
    """[rows, tokens] of every forward of the scorer."""
    seen: list[Any] = []

    def noting(forward: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def noted(ids: mx.array, caches: list[Any]) -> mx.array:
            seen.append(ids.shape)
            return forward(ids, caches)

        return noted

    driver.read_by(noting)
    return seen


@pytest.mark.parametrize("dora", [False, True])
def test_rows_carry_what_the_base_thinks_of_them(driver: Driver, dora: bool) -> None:
    driver.push("p", driver.bundle(1, dora=dora))
    prompts = prompts_of([25, 1, 60], 286)
    rows = driver.generate(prompts, n=4, policy="p", max_tokens=20, wants=BASE_TOO)
    assert len(rows) == 12 and {row.finish_reason for row in rows} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert_base(driver, rows)
    assert max(np.max(np.abs(np.subtract(row.base_logprobs, row.logprobs))) for row in rows) > 1e-2
    assert driver.scoring.cells == 0
    (silent,) = driver.generate(prompts[:1], policy="p", max_tokens=3)
    assert silent.base_logprobs is None


def test_the_prompt_is_read_once_for_all_samples(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    seen = watch(driver)
    rows = driver.generate(prompts_of([200], 286), n=6, policy="p", max_tokens=30, ignore_eos=True, wants=BASE_TOO)
    inputs = sum(rows * tokens for rows, tokens in seen)
    # Chunks that are compiled are filled up, to less than twice their tokens.
    assert 199 + 6 * 30 <= inputs < 2 * (199 + 6 * 30), seen
    assert sum(tokens for rows, tokens in seen if rows == 1) < 2 * 199, seen
    assert max(rows for rows, _ in seen) == 6
    driver.read_by_itself()
    assert_base(driver, rows)


def test_a_group_larger_than_the_reader_keeps_its_prompt(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=8, prefill_tokens=32)
    small.push("p", small.bundle(1))
    seen = watch(small)
    rows = small.generate(prompts_of([100], 286), n=10, policy="p", max_tokens=12, ignore_eos=True, wants=BASE_TOO)
    assert sum(tokens for rows, tokens in seen if rows == 1) < 2 * 100, "the prompt was read once"
    assert_base(small, rows)
    assert small.scoring.cells == 0


def test_switched_and_superseded_rows_have_them_too(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    prompt = prompts_of([25], 286)
    move = driver.submit(prompt, n=2, policy="p", max_tokens=20, ignore_eos=True, on_update="switch", wants=BASE_TOO)
    end = driver.submit(prompt, n=2, policy="p", max_tokens=200, ignore_eos=True, on_update="abort", wants=BASE_TOO)
    driver.turn(6)
    driver.push("p", driver.bundle(2))
    driver.finish(move, end)
    assert [len(row.spans) for row in driver.rollouts(move)] == [2, 2]
    assert {row.finish_reason for row in driver.rollouts(end)} == {FinishReason.SUPERSEDED}
    assert_base(driver, driver.rollouts(move) + driver.rollouts(end))


def test_rows_on_the_base_have_their_own_logprobs_and_need_no_pass(base: Driver) -> None:
    seen = watch(base)
    rows = base.generate(prompts_of([25], 286), n=3, max_tokens=12, wants=BASE_TOO)
    assert not seen
    assert all(row.base_logprobs == row.logprobs for row in rows)


def test_rows_come_when_their_group_is_read_and_others_go_on(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    first, second = prompts_of([40, 10], 286)
    busy = driver.submit([second], n=2, max_tokens=60, ignore_eos=True, seed=5)
    id = driver.submit([first, second], n=3, policy="p", max_tokens=30, seed=2, wants=BASE_TOO)
    turns = 0
    while not driver.over(id):
        driver.turn()
        turns += 1
    # A turn in which rows move goes by without a step.
    assert driver.status.steps >= turns - 4 and not driver.over(busy)
    order = [e.rollout.prompt_index for e in driver.events if isinstance(e, RowFinished) and e.id == id]
    assert sorted(order) in (order, order[::-1]), "the rows of a group come together"
    driver.finish(busy)
    assert_base(driver, driver.rollouts(id))
    alone = driver.generate([second], n=2, max_tokens=60, ignore_eos=True, seed=5)
    assert [r.token_ids for r in driver.rollouts(busy)] == [r.token_ids for r in alone]


@pytest.mark.parametrize("reason", ["abort", "timeout"])
def test_an_ended_request_does_not_wait_for_the_pass(driver: Driver, qwen: Path, reason: str) -> None:
    small = Driver.start(qwen, driver.model, prefill_tokens=16)
    small.push("p", small.bundle(1))
    id = small.submit(prompts_of([600], 286), n=2, policy="p", max_tokens=6, ignore_eos=True, wants=BASE_TOO)
    small.until(lambda: small.scoring.busy)
    small.turn(3)
    small.abort(id, reason)
    small.finish(id, turns=2)
    rows = small.rollouts(id)
    assert [row.base_logprobs for row in rows] == [None, None] and all(len(row.token_ids) == 6 for row in rows)
    assert not small.scoring.busy and small.scoring.cells == 0
    assert all(v.rows_in_use == 0 for v in small.status.policies[0].versions)


def test_an_abort_while_rows_run_reports_the_finished_ones(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = driver.submit(prompts_of([10], 286), n=64, policy="p", max_tokens=300, wants=BASE_TOO)
    driver.turn()
    driver.until(lambda: any(group.withheld for group in driver.requests.open_requests[id].groups))
    driver.abort(id)
    driver.finish(id, turns=3)
    rows = driver.rollouts(id)
    assert len(rows) == 64 and {row.finish_reason for row in rows} >= {FinishReason.STOP, FinishReason.ABORTED}
    assert all(row.base_logprobs is None for row in rows if row.token_ids)


def test_rows_that_failed_have_them_for_what_they_have(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = driver.submit(prompts_of([10], 286), n=2, policy="p", max_tokens=20, ignore_eos=True, wants=BASE_TOO)
    driver.turn(6)
    batch = driver.batches
    step = batch.step

    def broken() -> None:
        raise ValueError("the device is on fire")

    batch.step = broken  # type: ignore[assignment, method-assign]
    driver.turn()
    assert driver.busy, "the pass does not wait for the next command"
    batch.step = step  # type: ignore[method-assign]
    driver.finish(id)
    rows = driver.rollouts(id)
    assert {row.finish_reason for row in rows} == {FinishReason.ERROR} and all(row.token_ids for row in rows)
    assert_base(driver, rows)


def test_a_pass_that_fails_fails_its_rows_by_name(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))

    def broken(ids: mx.array, caches: list[Any]) -> mx.array:
        raise ValueError("no base today")

    driver.read_by(lambda forward: broken)
    id = driver.submit(prompts_of([10], 286), n=2, policy="p", max_tokens=5, ignore_eos=True, wants=BASE_TOO)
    driver.finish(id)
    for row in driver.rollouts(id):
        assert row.error is not None and row.error.code == EngineFault.code and "no base today" in row.error.message
        assert len(row.token_ids) == 5 and row.base_logprobs is None
    driver.read_by_itself()
    rows = driver.generate(prompts_of([10], 286), policy="p", max_tokens=5, wants=BASE_TOO)
    assert_base(driver, rows)


def test_prompt_and_base_values_come_together(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    wants = Wants(base_logprobs=True, prompt_logprobs=True)
    (prompt,) = prompts_of([300], 286)
    rows = driver.generate([prompt], n=2, policy="p", max_tokens=2, ignore_eos=True, wants=wants)
    (score,) = driver.score([prompt], policy="p")
    for row in rows:
        assert row.prompt_logprobs is not None
        assert_near(row.prompt_logprobs[1:], score.logprobs[1:], TINY.of_logprobs(score.logprobs[1:], len(prompt)))
    assert_base(driver, rows)


def test_rows_that_wait_for_values_count_as_produced_when_the_server_stops(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, prefill_tokens=16)
    small.push("p", small.bundle(1))
    id = small.submit(prompts_of([600], 286), policy="p", max_tokens=6, ignore_eos=True, wants=BASE_TOO)
    small.until(lambda: small.scoring.busy)
    small.turn(2)
    small.engine.stop()
    assert small.error(id) is None and len(small.rollouts(id)[0].token_ids) == 6


@pytest.mark.parametrize("family", some_long(["granitemoehybrid", "gemma2"], "granitemoehybrid"))
def test_families_that_are_read_one_at_a_time(
    family: str, model_path: Callable[[str], Path], bare_model: Callable[[str], ResidentModel]
) -> None:
    driver = Driver.start(model_path(family), prefill_tokens=32)
    driver.push("p", driver.bundle(1))
    rows = driver.generate(prompts_of([50], 286), n=3, policy="p", max_tokens=10, ignore_eos=True, wants=BASE_TOO)
    assert_base(driver, rows, amplified(family))
    seen = watch(driver)
    driver.generate(prompts_of([50], 286), n=3, policy="p", max_tokens=10, ignore_eos=True, wants=BASE_TOO)
    assert sum(tokens for _, tokens in seen) == 49 + 3 * 10, "the prompt was read once"
