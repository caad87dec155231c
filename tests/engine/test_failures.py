"""What fails does so by name, is reported once, and takes along only what may have been computed with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rollout_server.errors import EngineFault, NonFiniteLogits
from tests.support.engine.driver import Driver, prompts_of

PROMPT = prompts_of([10], 286, seed=8)[0]


def test_a_failing_push_is_answered_by_name_and_the_engine_goes_on(driver: Driver) -> None:
    slots = driver.resident.slots
    stage = slots.stage
    slots.stage, calls = _once(RuntimeError("no memory for it"))
    running = driver.submit([PROMPT], max_tokens=40, ignore_eos=True)
    driver.turn(3)
    id = driver.publish("p", driver.bundle(1))
    later = driver.submit([PROMPT], max_tokens=5, ignore_eos=True)
    driver.finish(id, running, later)
    assert calls and driver.error(id).code == "engine_fault" and "no memory for it" in driver.error(id).message
    # It may have left a stack half written, which every row reads.
    (row,) = driver.rollouts(running)
    assert row.error is not None and row.error.message.startswith("Staging a version failed while this row ran")
    assert len(driver.rollouts(later)[0].token_ids) == 5
    slots.stage = stage
    assert driver.push("p", driver.bundle(1)).version.number == 1
    assert len(driver.generate([PROMPT], policy="p", max_tokens=5, ignore_eos=True)[0].token_ids) == 5


def test_a_group_that_cannot_be_placed_fails_by_name(base: Driver) -> None:
    store = base.batch(0).store
    store.begin, calls = _once(RuntimeError("no room"))
    id = base.submit([PROMPT], n=2, max_tokens=5)
    base.finish(id, turns=3)
    assert calls and base.error(id).code == "engine_fault"
    assert len(base.generate([PROMPT], max_tokens=5, ignore_eos=True)[0].token_ids) == 5


def test_a_failing_score_hurts_nobody_else(base: Driver) -> None:
    id = base.submit([PROMPT], max_tokens=40, ignore_eos=True)
    base.turn(3)
    base.read_by(lambda forward: _once(ValueError("bad score"))[0])
    with pytest.raises(EngineFault, match="bad score"):
        base.score([PROMPT])
    base.read_by_itself()
    base.finish(id)
    assert len(base.rollouts(id)[0].token_ids) == 40


def test_a_row_that_ended_in_a_step_whose_recording_failed_is_still_reported(base: Driver) -> None:
    first = base.submit([PROMPT], max_tokens=3, ignore_eos=True)
    other = base.submit([PROMPT], max_tokens=9, ignore_eos=True, stop=("never",))
    base.turn(2)
    row = next(r for r in base.batches.rows if r.text is not None)
    row.text = SimpleNamespace(push=_once(ValueError("tokenizer broke"))[0])  # type: ignore[assignment]
    base.finish(first, other, turns=6)


def test_scoring_under_a_broken_version_is_an_error_and_not_a_row_of_nulls(driver: Driver) -> None:
    driver.push("wild", driver.bundle(1, strength=1e25))
    with pytest.raises(NonFiniteLogits, match="wild@1"):
        driver.score([PROMPT], policy="wild")
    assert driver.score([PROMPT])[0].logprobs[1] is not None


def _once(error: Exception):  # type: ignore[no-untyped-def]
    """A function that raises the first time and is then a memory of that."""
    calls = []

    def broken(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise error

    return broken, calls
