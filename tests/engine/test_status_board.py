"""A look at the rows: what is told of each, and that looking changes nothing."""

from __future__ import annotations

from pathlib import Path

from rollout_server.engine.messages.control import LookAtRows, RowsSeen
from rollout_server.engine.status_board import ROWS_TOLD
from tests.support.engine.driver import Driver


def look(driver: Driver) -> RowsSeen:
    driver.send(LookAtRows("look"))
    driver.turn()
    return [event for event in driver.events if isinstance(event, RowsSeen)][-1]


def test_rows_are_told_with_the_version_that_samples_their_next_token(qwen: Path) -> None:
    driver = Driver.start(qwen, max_batch=8)
    first = driver.push("policy", driver.bundle(1))
    stays, follows, base = (
        driver.submit([[5, 6, 7]], policy=policy, on_update=update, max_tokens=30, ignore_eos=True)
        for policy, update in (("policy", "finish"), ("policy", "switch"), ("base", "finish"))
    )
    driver.turn(6)
    before = {row.id: row for row in look(driver).rows}
    assert before.keys() == {stays, follows, base}
    assert all(0 < row.tokens < row.most == 30 and not row.preempted for row in before.values())
    assert before[stays].version == before[follows].version == first.version
    second = driver.push("policy", driver.bundle(2))
    seen = look(driver)
    after = {row.id: row.version for row in seen.rows}
    assert (after[stays], after[follows], after[base].number) == (first.version, second.version, 0)
    assert seen.count == 3
    assert {(version.name, version.number): count for version, count in seen.by_version} == {
        ("policy", 1): 1,
        ("policy", 2): 1,
        ("base", 0): 1,
    }
    driver.finish(stays, follows, base)
    assert look(driver) == RowsSeen("look", (), 0)


def test_rows_that_are_looked_at_sample_what_others_do(qwen: Path) -> None:
    alone, watched = Driver.start(qwen, max_batch=8), Driver.start(qwen, max_batch=8)
    ids = [driver.submit([[5, 6, 7], [9, 8]], n=2, seed=5) for driver in (alone, watched)]
    alone.finish(ids[0])
    while not watched.over(ids[1]):
        look(watched)
    pairs = zip(alone.rollouts(ids[0]), watched.rollouts(ids[1]), strict=True)
    assert all((one.token_ids, one.logprobs) == (other.token_ids, other.logprobs) for one, other in pairs)


def test_of_many_rows_the_first_are_told_and_all_are_counted(qwen: Path) -> None:
    driver = Driver.start(qwen, max_batch=ROWS_TOLD + 8)
    id = driver.submit([[5, 6, 7]], n=ROWS_TOLD + 8, max_tokens=40, ignore_eos=True)
    driver.until(lambda: driver.status.running == ROWS_TOLD + 8)
    seen = look(driver)
    assert (len(seen.rows), seen.count) == (ROWS_TOLD, ROWS_TOLD + 8)
    assert [count for _, count in seen.by_version] == [ROWS_TOLD + 8]
    driver.abort(id)
