"""Where KV memory is short, several things happen at once: what each of them may not do to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.messages.control import Release
from rollout_server.rollout import FinishReason, Rollout, Wants
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.engine.scheduling.test_on_update import spans
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

PROMPTS = prompts_of([6, 150, 150], 286)
AMPLE = 100_000


@pytest.fixture
def driver(qwen: Path) -> Driver:
    """With a model of its own: some of these tests push."""
    return Driver.start(qwen, max_batch=8, prefill_tokens=16, prefix_cache=False)


def alone(driver: Driver, count: int) -> list[Rollout]:
    return [driver.generate([p], seed=i, max_tokens=40, ignore_eos=True)[0] for i, p in enumerate(PROMPTS[:count])]


def running(driver: Driver, count: int) -> list[str]:
    ids = [driver.submit([p], seed=i, max_tokens=40, ignore_eos=True) for i, p in enumerate(PROMPTS[:count])]
    driver.until(lambda: len(driver.batches.rows) == count and not driver.batches.reading)
    return ids


def aside(driver: Driver, count: int = 1) -> None:
    """Until so many rows gave their KV up; then there is room again."""
    driver.set_kv_limit(260)
    driver.until(lambda: len(driver.batches.preempted) >= count)
    driver.set_kv_limit(AMPLE)


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    original, failed = getattr(owner, name), []

    def broken(*args: Any, **options: Any) -> Any:
        if not failed:
            failed.append(1)
            raise MemoryError("injected")
        return original(*args, **options)

    monkeypatch.setattr(owner, name, broken)
    return failed


def test_memory_given_back_leaves_what_a_row_has_read_again(driver: Driver) -> None:
    expected = alone(driver, 2)
    ids = running(driver, 2)
    aside(driver)
    driver.turn(3)
    assert driver.batches.reading
    driver.send(Release("x"))
    driver.finish(*ids)
    for one, id in zip(expected, ids, strict=True):
        assert_same(one, driver.rollouts(id)[0], tolerance(driver, [one]))


def test_a_score_that_joins_leaves_rows_that_come_back(driver: Driver) -> None:
    expected = alone(driver, 3)
    ids = running(driver, 3)
    aside(driver, 2)
    driver.set_kv_limit(900)
    driver.until(lambda: any(unread < 120 for unread in driver.unread_of_returning))
    driver.ask_score(prompts_of([300], 286))
    driver.finish(*ids)
    for one, id in zip(expected, ids, strict=True):
        assert_same(one, driver.rollouts(id)[0], tolerance(driver, [one]))


def test_scores_take_no_memory_from_rows_and_get_their_turn(driver: Driver) -> None:
    driver.set_kv_limit(4 * 192)
    rows = [driver.submit([p], max_tokens=100, ignore_eos=True) for p in prompts_of([60] * 8, 286)]
    driver.turn()
    score = driver.ask_score(prompts_of([300], 286))
    while not all(driver.over(id) for id in rows):
        driver.turn()
        assert driver.batches.cells_after_step + driver.scoring.cells <= 4 * 192
        # Rows that came later wait for it, those that ran when it came do not.
        assert driver.is_scored(score) or not all(driver.over(id) for id in rows[:7])
    assert driver.is_scored(score) and driver.preemptions == 0


def test_a_row_that_leaves_a_version_it_has_only_read_reads_again(driver: Driver, qwen: Path) -> None:
    """Its older version is gone while it is away, and its newer one before it is back: spans say only what is true."""
    driver = Driver.start(qwen, driver.model, max_batch=8, prefill_tokens=16, prefix_cache=False, keep_versions=1)
    bundles = [driver.bundle(seed) for seed in (1, 2, 3)]
    driver.push("p", bundles[0])
    short = driver.submit(PROMPTS[:1], max_tokens=60, ignore_eos=True)
    long = driver.submit(PROMPTS[1:2], policy="p", max_tokens=60, ignore_eos=True, on_update="switch")
    driver.until(lambda: len(driver.batches.rows) == 2 and not driver.batches.reading)
    driver.turn(5)
    driver.push("p", bundles[1])
    driver.turn(3)
    aside(driver)
    driver.turn(2)
    driver.push("p", bundles[2])
    driver.finish(short, long)
    (row,) = driver.rollouts(long)
    *_, last = spans(row)
    assert (last[0], last[3]) == (3, "recomputed")
    (found,) = driver.score([row.prompt_ids + row.token_ids], [len(row.prompt_ids)], policy="p@3")
    assert_near(row.logprobs[last[1] :], found.logprobs[last[1] :], TINY.of_row(row))


def test_a_row_that_switches_before_its_first_token_can_be_drawn_again(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = driver.submit(PROMPTS[1:2], policy="p", max_tokens=20, ignore_eos=True, on_update="switch")
    driver.turn(3)
    driver.push("p", driver.bundle(2))
    driver.finish(id)
    (row,) = driver.rollouts(id)
    assert spans(row) == [(2, 0, 20, None)]
    (replayed,) = driver.replay([row])
    assert replayed.first_difference is None


@pytest.mark.parametrize("name", ["seat", "leave"])
def test_a_row_that_comes_or_goes_while_something_fails_is_answered(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ids = running(driver, 3)
    if name == "seat":
        aside(driver)
    (store,) = {batch.store for batch in driver.every_batch}
    failed = fail_once(monkeypatch, store, name)
    if name == "leave":
        driver.set_kv_limit(260)
    driver.finish(*ids)
    reasons = {row.finish_reason for id in ids for row in driver.rollouts(id)}
    assert failed and FinishReason.ERROR in reasons
    driver.turn(2)
    assert driver.batches.size == 0 and not driver.batches.preempted


def test_a_row_that_ends_while_its_place_cannot_be_freed_holds_no_version(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.push("p", driver.bundle(1))
    id = driver.submit(PROMPTS[:1], policy="p", max_tokens=5, ignore_eos=True)
    driver.until(lambda: bool(driver.batches.rows))
    failed = fail_once(monkeypatch, driver.batch(0).store, "leave")
    driver.finish(id)
    driver.turn(3)
    assert failed and all(v.rows_in_use == 0 for v in driver.status.policies[0].versions)


def test_a_score_that_cannot_begin_is_answered(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = fail_once(monkeypatch, driver.reader, "begin")
    driver.ask_score(prompts_of([40], 286))
    driver.turn(4)
    assert failed and not driver.scoring.busy


def test_groups_that_step_aside_keep_their_places_in_the_queue(driver: Driver) -> None:
    driver.submit(PROMPTS[:1], max_tokens=200, ignore_eos=True)
    driver.turn(3)
    ids = [driver.submit([p], max_tokens=20, ignore_eos=True) for p in PROMPTS[1:]]
    driver.turn(2)
    assert len(driver.batches.joining) == 2
    driver.set_kv_limit(100)
    driver.turn()
    assert [group.request.id for group in driver.waiting_groups] == ids


def test_every_sample_of_a_group_whose_prompt_cannot_be_scored_is_reported_once(
    driver: Driver, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver.start(qwen, driver.model, max_batch=3, prefill_tokens=16, prefix_cache=False)
    other = driver.submit(PROMPTS[:1], max_tokens=60, ignore_eos=True)
    driver.turn(3)
    failed = fail_once(monkeypatch, driver.reader, "read")
    id = driver.submit(PROMPTS[1:2], n=4, max_tokens=10, ignore_eos=True, wants=Wants(prompt_logprobs=True))
    driver.finish(other, id)
    assert failed and sorted(row.sample_index for row in driver.rollouts(id)) == [0, 1, 2, 3]


@pytest.mark.long
def test_arrays_that_rows_have_left_count_too(qwen: Path) -> None:
    """Rows of two parameter sets, one after the other, in memory for both only if neither keeps what it has left."""
    driver = Driver.start(qwen, max_batch=8)
    driver.push("m", driver.bundle(1), mode="merged")
    limit, cell = 4 * 320, driver.model.info.kv_bytes_per_token
    driver.set_kv_limit(limit)
    short, long = (
        driver.submit(PROMPTS[:1], n=4, policy=policy, max_tokens=tokens, ignore_eos=True)
        for policy, tokens in (("m", 140), ("base", 290))
    )
    while not (driver.over(short) and driver.over(long)):
        driver.turn()
        assert driver.batches.nbytes <= limit * cell


@pytest.mark.long
def test_a_row_that_changes_its_batch_leaves_what_is_scored_its_room(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for room where there is none, and goes on with the version that is live."""
    driver.push("p", driver.bundle(1), mode="merged")
    limit = 660
    driver.set_kv_limit(limit)
    prompts, hows = prompts_of([20] * 4, 286), ["finish"] * 3 + ["switch"]
    ids = [
        driver.submit([prompt], policy="p", max_tokens=60, ignore_eos=True, on_update=how)
        for prompt, how in zip(prompts, hows, strict=True)
    ]
    driver.turn(6)
    score = driver.ask_score(prompts_of([250], 286))
    driver.turn()
    used: list[int] = []
    move = driver.batches.move

    def watched(row: Any, parameters: int) -> bool:
        moved = move(row, parameters)
        used.append(driver.kv_used)
        return moved

    monkeypatch.setattr(driver.batches, "move", watched)
    driver.push("p", driver.bundle(2), mode="merged")
    driver.finish(*ids)
    assert driver.scored(score) and used and max(used) <= limit
    assert driver.preemptions == 1
    (row,) = driver.rollouts(ids[-1])
    assert len(row.token_ids) == 60 and [span.version.number for span in row.spans] == [1, 2]
