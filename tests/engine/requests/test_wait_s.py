"""`wait_s`: a group waits for the version it needs, and holds up nobody."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from rollout_server.engine.messages.control import Stop
from rollout_server.engine.messages.versions import Delete
from rollout_server.errors import NeverAdmitted, StalePolicy, UnknownPolicy
from rollout_server.rollout import FinishReason
from tests.support.engine.driver import Driver, prompts_of

PROMPT = prompts_of([10], 286)[0]
LONG = 3600.0


@pytest.fixture(autouse=True)
def patient(driver: Driver) -> None:
    """An idle engine waits for its mail here, as it does on its thread."""
    driver.mailbox.patient = True


def waiting(driver: Driver, min_version: int = 2, wait_s: float = LONG, **options: object) -> str:
    options = {"policy": "p", "max_tokens": 4, "ignore_eos": True, **options}
    return driver.submit([PROMPT], min_version=min_version, wait_s=wait_s, **options)  # type: ignore[arg-type]


def test_a_push_lets_it_start_and_others_pass_meanwhile(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = waiting(driver)
    other = driver.submit([PROMPT], policy="p", max_tokens=4, ignore_eos=True)
    driver.finish(other)
    assert not driver.over(id) and driver.status.waiting == 1 and not driver.busy
    driver.push("p", driver.bundle(2))
    driver.finish(id)
    (row,) = driver.rollouts(id)
    assert [span.version.number for span in row.spans] == [2]


def test_after_wait_s_it_is_stale(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    for patience in (0.2, 1, 3, 9):  # A busy machine may take longer than the first for a turn.
        id, began = waiting(driver, wait_s=patience), time.monotonic()
        driver.turn()
        if not driver.over(id):
            break
    assert not driver.over(id)
    driver.finish(id, turns=3 + int(patience))
    assert time.monotonic() - began >= patience
    error = driver.error(id)
    assert isinstance(error, StalePolicy) and error.retryable and "at version 1" in error.message
    assert driver.status.waiting == 0
    driver.push("p", driver.bundle(2))
    driver.turn(2)
    assert driver.rollouts(id)[0].finish_reason is FinishReason.ERROR


def test_what_was_produced_is_kept_when_another_prompt_waits_in_vain(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=1)
    small.push("p", small.bundle(1))
    small.push("p", small.bundle(2))
    id = small.submit([PROMPT] * 2, policy="p", max_tokens=4, ignore_eos=True, min_version=2, wait_s=0.05)
    small.until(lambda: small.status.running == 1)
    # Rolled back before the second prompt's turn came.
    small.activate("p", 1)
    small.until(lambda: bool(small.rollouts(id)))
    small.turn(2)
    time.sleep(0.06)
    small.finish(id)
    assert small.error(id) is None
    first, second = small.rollouts(id)
    assert len(first.token_ids) == 4 and second.error is not None and second.error.code == "stale_policy"


def test_those_that_are_ready_start_in_the_order_they_came(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=1)
    small.push("p", small.bundle(1))
    ids = [waiting(small, version) for version in (3, 2, 2)]
    small.turn(2)
    last = small.submit([PROMPT], policy="p", max_tokens=4, ignore_eos=True, min_version=1)
    small.push("p", small.bundle(2))
    ended: list[str] = []
    while len(ended) < 3:
        small.turn()
        ended += [id for id in [*ids, last] if small.over(id) and id not in ended]
    assert ended == [ids[1], ids[2], last] or ended == [last, ids[1], ids[2]]
    assert not small.over(ids[0])
    small.push("p", small.bundle(3))
    small.finish(ids[0])


def test_it_fails_at_once_where_waiting_is_no_use(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    unknown = waiting(driver, policy="nobody")
    base = waiting(driver, policy="base")
    none = driver.submit([PROMPT], policy="p", max_tokens=4, min_version=2)
    driver.finish(unknown, base, none, turns=2)
    assert isinstance(driver.error(unknown), UnknownPolicy)
    assert isinstance(driver.error(base), StalePolicy) and not driver.error(base).retryable
    assert isinstance(driver.error(none), StalePolicy)


def test_a_name_that_goes_away_ends_the_wait(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = waiting(driver)
    driver.turn(2)
    driver.change(Delete("", "p"))
    driver.finish(id, turns=2)
    assert driver.error(id).code in ("unknown_policy", "version_gone")


def test_it_can_be_aborted_and_has_its_timeout(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id, late = waiting(driver), waiting(driver, deadline=time.monotonic() + 0.5)
    driver.turn()
    driver.abort(id)
    driver.finish(id, turns=2)
    (row,) = driver.rollouts(id)
    assert row.finish_reason is FinishReason.ABORTED and row.token_ids == ()
    driver.finish(late, turns=3)
    assert isinstance(driver.error(late), NeverAdmitted)
    assert driver.status.waiting == 0 and not driver.groups_without_version


@pytest.mark.parametrize("ends", ["wait_s", "deadline"])
def test_an_idle_engine_wakes_for_the_end_of_the_wait(
    driver: Driver, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sleep of an hour between two commands, only the wait's own end can wake it."""
    monkeypatch.setattr("rollout_server.engine.loop.IDLE_WAIT_S", LONG)
    driver.push("p", driver.bundle(1))
    options = {"wait_s": 0.3} if ends == "wait_s" else {"deadline": time.monotonic() + 0.3}
    id = waiting(driver, **options)  # type: ignore[arg-type]
    driver.turn()
    # If it did not wake by itself, this would wake it much later.
    rescue = threading.Timer(100.0, lambda: driver.send(Stop()))
    rescue.start()
    driver.finish(id, turns=4)
    assert driver.error(id) is not None and rescue.is_alive(), "it woke by itself"
    rescue.cancel()
