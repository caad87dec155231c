"""Versions that are kept for a call: one for all its rows, whatever becomes of the name, until they are let go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_server.engine.messages.control import Abort, Pause, Paused, Resume
from rollout_server.engine.messages.scoring import Classified, Classify, HoldScorer, LetScorerGo, ScorerHeld
from rollout_server.engine.messages.versions import Delete
from rollout_server.errors import EngineUnavailable, InvalidField, UnknownPolicy
from rollout_server.rollout import PolicyAddress
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near
from tests.support.tiny_scorers import reward_bundle

ROWS = prompts_of([30, 4, 90], 200)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("held"))


@pytest.fixture
def driver(path: Path) -> Driver:
    return Driver.start(path, prefill_tokens=48, keep_versions=1)


def event(driver: Driver, kind: Any, id: str) -> Any:
    return next((e for e in driver.events if isinstance(e, kind) and e.id == id), None)


def hold(driver: Driver, policy: str = "rm", id: str = "h", owner: str = "owner") -> ScorerHeld:
    driver.send(HoldScorer(id, owner, PolicyAddress.parse(policy)))
    driver.until(lambda: driver.error(id) or event(driver, ScorerHeld, id))
    if driver.error(id):
        raise driver.error(id)
    return event(driver, ScorerHeld, id)  # type: ignore[no-any-return]


def ask(driver: Driver, rows: Sequence[Sequence[int]] = ROWS, held: str = "h") -> str:
    driver.count += 1
    id = f"reward{driver.count}"
    places = tuple((driver.model.info.head_position(row),) for row in rows)
    driver.send(Classify(id, PolicyAddress("rm"), tuple(map(tuple, rows)), places, held=held))
    return id


def scores(driver: Driver, id: str) -> np.ndarray:
    driver.until(lambda: driver.error(id) or event(driver, Classified, id))
    if driver.error(id):
        raise driver.error(id)
    return np.concatenate([np.frombuffer(own, "<f4") for own in event(driver, Classified, id).scores])


def in_use(driver: Driver) -> dict[int, int]:
    return {kept.version.number: kept.rows_in_use for line in driver.policies.snapshot() for kept in line.versions}


def test_one_version_scores_the_call_whatever_its_name_means_later(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1))
    wanted = np.concatenate(driver.classify(ROWS, "rm"))[:, 0]
    held = hold(driver)
    assert (held.version.number, held.labels) == (1, (None,))
    first = scores(driver, ask(driver))
    np.testing.assert_array_equal(first, wanted)
    driver.push("rm", reward_bundle(driver.model.info, 2))
    newer = np.concatenate(driver.classify(ROWS, "rm"))[:, 0]
    assert not np.allclose(newer, wanted, atol=1e-3)
    np.testing.assert_array_equal(scores(driver, ask(driver)), wanted)
    driver.send(Delete("gone", "rm"))
    driver.turn(2)
    np.testing.assert_array_equal(scores(driver, ask(driver)), wanted)
    late = ask(driver)
    driver.send(LetScorerGo("h"))
    driver.send(LetScorerGo("h"))
    np.testing.assert_array_equal(scores(driver, late), wanted)
    with pytest.raises(EngineUnavailable, match="let go"):
        scores(driver, ask(driver))
    driver.turn(2)
    assert not driver.policies.snapshot(), "nothing keeps it any more"


def test_what_scores_nothing_is_not_held(driver: Driver) -> None:
    driver.push("policy", driver.bundle(1))
    for policy, error in (("policy", InvalidField), ("base", InvalidField), ("nobody", UnknownPolicy)):
        with pytest.raises(error):
            hold(driver, policy, id=f"h-{policy}")
    assert in_use(driver) == {1: 0}


def test_rows_are_scored_while_others_decode(driver: Driver) -> None:
    """Both as if they were alone: greedy ids, and scores within what a sum in another order may change."""
    driver.push("rm", reward_bundle(driver.model.info, 1))
    wanted = np.concatenate(driver.classify(ROWS, "rm"))[:, 0]
    prompts = prompts_of([20, 7], 300)
    alone = [row.token_ids for row in driver.generate(prompts, max_tokens=40, temperature=0.0)]
    hold(driver)
    running = driver.submit(prompts, max_tokens=40, temperature=0.0)
    driver.until(lambda: driver.status.running == 2)
    found = scores(driver, ask(driver))
    assert driver.status.running == 2, "they still run"
    driver.finish(running)
    assert [row.token_ids for row in driver.rollouts(running)] == alone
    assert_near(found, wanted, TINY.of_logits(wanted, 90))


def test_the_end_of_a_request_ends_its_rewards(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1))
    hold(driver)
    id = ask(driver, prompts_of([400] * 4, 300))
    driver.turn()
    assert event(driver, Classified, id) is None
    driver.send(Abort(("owner",)))
    with pytest.raises(EngineUnavailable, match=r"\(abort\)"):
        scores(driver, id)
    own = ask(driver, prompts_of([400] * 4, 300))
    driver.turn()
    driver.send(Abort((own,), "disconnect"))
    with pytest.raises(EngineUnavailable, match=r"\(disconnect\)"):
        scores(driver, own)
    driver.send(LetScorerGo("h"))
    driver.turn()
    assert in_use(driver) == {1: 0}


def test_a_pause_lets_rows_that_have_run_have_their_rewards(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1))
    wanted = np.concatenate(driver.classify(ROWS, "rm"))[:, 0]
    hold(driver)
    driver.send(Pause("p", "wait", drain=True))
    driver.turn(2)
    assert event(driver, Paused, "p") is None, "rewards may still be asked for"
    np.testing.assert_array_equal(scores(driver, ask(driver)), wanted)
    driver.send(LetScorerGo("h"))
    driver.until(lambda: event(driver, Paused, "p") is not None)
    waits = driver.ask_classify(ROWS, "rm")
    driver.turn(3)
    assert event(driver, Classified, waits) is None, "what is nothing but reading waits"
    driver.send(Resume("go"))
    np.testing.assert_array_equal(np.concatenate(driver.classified(waits))[:, 0], wanted)


def test_a_frozen_engine_scores_nothing_until_it_goes_on(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1))
    hold(driver)
    driver.send(Pause("p", "keep"))
    id = ask(driver)
    driver.turn(3)
    assert event(driver, Classified, id) is None
    driver.send(Resume("go"))
    assert np.isfinite(scores(driver, id)).all()
