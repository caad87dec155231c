"""Pausing: what waits, what goes on, what ends."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rollout_server.engine.messages.control import Pause, Paused, Resume
from rollout_server.engine.messages.rollouts import RequestFailed
from rollout_server.errors import NeverAdmitted
from rollout_server.rollout import FinishReason, Wants
from tests.support.engine.driver import Driver, prompts_of

LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "seed": 3}


def pause(driver: Driver, mode: Any, id: str = "pause", *, drain: bool = False) -> None:
    driver.send(Pause(id, mode, drain))


def resume(driver: Driver) -> None:
    driver.send(Resume("resume"))
    driver.turn()


def answered(driver: Driver, id: str = "pause") -> bool:
    return any(isinstance(event, Paused) and event.id == id for event in driver.events)


def started(driver: Driver, **options: Any) -> str:
    """A request with rows in the middle of their work."""
    id = driver.submit(prompts_of([5, 30], driver.model.info.vocab_size), **{**LONG, **options})
    before = driver.status.tokens
    driver.until(lambda: driver.status.tokens > before + 6)
    return id


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_new_work_waits(base: Driver, mode: str) -> None:
    pause(base, mode)
    base.turn()
    assert answered(base) and base.status.paused == mode
    prompts = prompts_of([5], base.model.info.vocab_size)
    id, scored = base.submit(prompts, **LONG), base.ask_score([[1, 2, 3]])
    base.turn(10)
    assert base.status.steps == 0 and not base.over(id) and not base.is_scored(scored)
    resume(base)
    assert base.status.paused is None
    base.finish(id)
    assert base.rollouts(id)[0].token_ids == base.generate(prompts, **LONG)[0].token_ids
    assert len(base.scored(scored)) == 1


def test_what_runs_goes_on(base: Driver) -> None:
    id = started(base, n=2, wants=Wants(base_logprobs=True))
    pause(base, "wait")
    pause(base, "wait", "drained", drain=True)
    base.turn()
    assert answered(base) and not answered(base, "drained")
    base.until(lambda: base.over(id))
    assert {row.finish_reason for row in base.rollouts(id)} == {FinishReason.LENGTH}
    base.until(lambda: answered(base, "drained"), 3)
    assert base.status.running == 0


def test_what_runs_freezes(base: Driver) -> None:
    alone = base.generate(prompts_of([5, 30], base.model.info.vocab_size), **LONG)
    id = started(base)
    pause(base, "keep", drain=True)
    base.turn()
    assert answered(base)
    steps, tokens = base.status.steps, base.status.tokens
    base.turn(5)
    assert (base.status.steps, base.status.tokens) == (steps, tokens) and base.status.running == 2
    assert not base.busy
    resume(base)
    base.finish(id)
    assert [row.token_ids for row in base.rollouts(id)] == [row.token_ids for row in alone]


def test_what_has_begun_ends(base: Driver) -> None:
    base.set_max_rows(3)
    id = started(base, n=2)
    waiting = base.submit(prompts_of([7], base.model.info.vocab_size), **LONG)
    pause(base, "abort", drain=True)
    base.until(lambda: answered(base), 5)
    rows = base.rollouts(id)
    assert [row.stop_reason for row in rows] == ["pause"] * 4
    assert [bool(row.token_ids) for row in rows] == [True, True, True, False]
    base.turn(5)
    assert base.status.running == 0 and not base.over(waiting)
    resume(base)
    base.finish(waiting)
    assert base.rollouts(waiting)[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_versions_change_meanwhile(driver: Driver, mode: str) -> None:
    driver.push("policy", driver.bundle(1))
    running = started(driver, policy="policy", on_update="switch")
    pause(driver, mode)
    driver.turn()
    id = driver.submit(prompts_of([5], driver.model.info.vocab_size), policy="policy", **LONG)
    driver.push("policy", driver.bundle(2))
    driver.activate("policy", 1)
    driver.push("policy", driver.bundle(3))
    resume(driver)
    driver.finish(id, running)
    assert {span.version.number for span in driver.rollouts(id)[0].spans} == {3}
    if mode == "keep":
        assert [span.version.number for span in driver.rollouts(running)[0].spans] == [1, 3]


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_aborts_and_deadlines_meanwhile(base: Driver, mode: str) -> None:
    running = started(base, deadline=time.monotonic() + 3600)
    pause(base, mode)
    base.turn()
    prompts = prompts_of([5], base.model.info.vocab_size)
    aborted, late = base.submit(prompts, **LONG), base.submit(prompts, deadline=time.monotonic() - 1, **LONG)
    scored = base.ask_score([[1, 2, 3]])
    base.turn()
    for id in (aborted, running, scored):
        base.abort(id)
    base.turn(3)
    assert base.over(aborted) and base.over(running)
    assert isinstance(base.error(late), NeverAdmitted)
    assert any(isinstance(event, RequestFailed) and event.id == scored for event in base.events)
    assert base.status.running == 0 and not base.requests.open_requests


def test_one_pause_replaces_another(base: Driver) -> None:
    id = started(base)
    pause(base, "keep")
    base.turn()
    pause(base, "wait", "second")
    base.turn()
    base.finish(id)
    assert base.rollouts(id)[0].finish_reason is FinishReason.LENGTH


def test_nobody_waits_for_ever(base: Driver) -> None:
    """A drained answer comes with the resume, and the end of the engine answers whoever is held."""
    started(base)
    pause(base, "wait", "drained", drain=True)
    base.turn()
    resume(base)
    assert answered(base, "drained") and answered(base, "resume")
    pause(base, "wait", "again", drain=True)
    scored = base.ask_score([[1, 2, 3]])
    base.turn()
    base.engine.stop()
    failed = {event.id for event in base.events if isinstance(event, RequestFailed)}
    assert {"again", scored} <= failed


def test_a_request_that_ended_before_it_began_leaves_an_engine_at_rest(base: Driver) -> None:
    """Its groups stand in the queue until they come to its head: an engine that has nothing else to do looks there."""
    pause(base, "wait")
    base.turn()
    id = base.submit(prompts_of([5], base.model.info.vocab_size), **LONG)
    base.turn()
    base.abort(id)
    base.turn()
    resume(base)
    base.turn()
    assert base.over(id) and not base.busy
