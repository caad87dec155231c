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
from rollout_server.errors import EngineUnavailable, InvalidField, RolloutError, UnknownPolicy
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


def ask(driver: Driver, rows: Sequence[Sequence[int]] = ROWS, held: str = "h", shared: int = 0) -> str:
    driver.count += 1
    id = f"reward{driver.count}"
    places = tuple((driver.model.info.head_position(row),) for row in rows)
    driver.send(Classify(id, PolicyAddress("rm"), tuple(map(tuple, rows)), places, held=held, shared=shared))
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


def test_a_pause_waits_for_no_rows_that_run_elsewhere(driver: Driver) -> None:
    """They may be waiting for its end."""
    driver.push("rm", reward_bundle(driver.model.info, 1))
    driver.send(HoldScorer("h", "owner", PolicyAddress("rm"), elsewhere=True))
    driver.until(lambda: event(driver, ScorerHeld, "h") is not None)
    driver.send(Pause("p", "wait", drain=True))
    driver.until(lambda: event(driver, Paused, "p") is not None)


def test_a_frozen_engine_scores_nothing_until_it_goes_on(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1))
    hold(driver)
    driver.send(Pause("p", "keep"))
    id = ask(driver)
    driver.turn(3)
    assert event(driver, Classified, id) is None
    driver.send(Resume("go"))
    assert np.isfinite(scores(driver, id)).all()


def group_of(samples: int) -> list[list[int]]:
    """Samples of one prompt of 150 tokens."""
    prompt, *tails = prompts_of([150, *[9] * samples], 200)
    return [prompt + tail for tail in tails]


@pytest.mark.parametrize("dora", [False, True])
def test_rows_of_one_prompt_read_it_once_however_they_come(dora: bool, driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1, dora=dora))
    rows = group_of(6)
    wanted = np.concatenate([driver.classify([row], "rm")[0] for row in rows])[:, 0]
    hold(driver)
    read = driver.tokens_read
    together = [ask(driver, [row], shared=150) for row in rows[:4]]
    found = [scores(driver, id) for id in together]
    assert driver.tokens_read - read == 150 + 4 * 9, "those that came at once"
    found += [scores(driver, ask(driver, [row], shared=150)) for row in rows[4:]]
    assert driver.tokens_read - read == 150 + 6 * 9, "and those that came later"
    assert_near(np.concatenate(found), wanted, TINY.of_logits(wanted, len(rows[0])))
    # What is kept is another version's no more than it is the base's.
    driver.push("rm", reward_bundle(driver.model.info, 2, dora=dora))
    hold(driver, id="newer")
    read = driver.tokens_read
    newer = scores(driver, ask(driver, rows[:1], held="newer", shared=150))
    assert driver.tokens_read - read == len(rows[0])
    assert_near(newer, np.concatenate(driver.classify(rows[:1], "rm"))[:, 0], TINY.of_logits(newer, len(rows[0])))


def test_a_prompt_that_is_scored_is_kept_within_what_rows_leave(driver: Driver) -> None:
    """Where there is no room for it, nobody waits for more than one other."""
    driver.push("rm", reward_bundle(driver.model.info, 1))
    rows = group_of(4)
    wanted = np.concatenate(driver.classify(rows, "rm"))[:, 0]
    hold(driver)
    driver.set_kv_limit(700)
    scores(driver, ask(driver, rows[:1], shared=150))
    driver.turn()
    assert 0 < driver.status.prefix.nbytes <= 700 * driver.model.info.kv_bytes_per_token
    driver.set_kv_limit(256)
    driver.turn()
    assert driver.status.prefix.nbytes <= 256 * driver.model.info.kv_bytes_per_token
    found = np.concatenate([scores(driver, id) for id in [ask(driver, [row], shared=150) for row in rows]])
    assert_near(found, wanted, TINY.of_logits(wanted, len(rows[0])))
    assert driver.kv_used == 0, "nothing that was scored stays on the account"


def test_without_a_prefix_cache_rows_are_scored_all_the_same(path: Path) -> None:
    driver = Driver.start(path, prefill_tokens=48, prefix_cache=False)
    driver.push("rm", reward_bundle(driver.model.info, 1))
    rows = group_of(3)
    wanted = np.concatenate(driver.classify(rows, "rm"))[:, 0]
    hold(driver)
    found = np.concatenate([scores(driver, id) for id in [ask(driver, [row], shared=150) for row in rows]])
    assert_near(found, wanted, TINY.of_logits(wanted, len(rows[0])))


def test_numbers_that_are_not_finite_are_not_kept_for_others(driver: Driver) -> None:
    driver.push("rm", reward_bundle(driver.model.info, 1))
    good, bad, *_ = group_of(2)
    bad = [*bad[:-1], 201]
    wanted = np.concatenate(driver.classify([good], "rm"))[:, 0]
    table = driver.model.module.model.embed_tokens
    table.weight[201] = float("nan")
    hold(driver)
    failed = ask(driver, [bad], shared=150)
    with pytest.raises(RolloutError, match="NaN or infinity"):
        scores(driver, failed)
    assert driver.status.prefix.nbytes == 0
    assert_near(scores(driver, ask(driver, [good], shared=150)), wanted, TINY.of_logits(wanted, len(good)))
