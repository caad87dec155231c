"""What running rows do when the name they follow moves on."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from rollout_server.rollout import FinishReason, Rollout
from tests.engine.scoring.test_reader import spans_of
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

PROMPT = prompts_of([25], 286, seed=6)[0]


def spans(row: Rollout) -> list[tuple[int, int, int, str | None]]:
    return [(s.version.number, s.start, s.end, s.kv) for s in row.spans]


def reread(driver: Driver, row: Rollout) -> list[float]:
    """The row's log-probabilities by plain forwards, each token under the version its span names, KV carried along."""
    caches = driver.model.make_caches()
    found = []
    policies = driver.policies
    tokens = list(row.prompt_ids) + list(row.token_ids)
    first = row.spans[0].version
    policies.route(0, [driver.resident.slots.slot(first.digest)])
    driver.model.forward(mx.array([tokens[: len(row.prompt_ids) - 1]]), caches)
    for span in row.spans:
        policies.route(0, [driver.resident.slots.slot(span.version.digest)])
        for index in range(span.start, span.end):
            at = len(row.prompt_ids) - 1 + index
            logits = driver.model.forward(mx.array([[tokens[at]]]), caches)[0, -1].astype(mx.float32)
            found.append(float(logits[tokens[at + 1]] - mx.logsumexp(logits)))
    return found


def test_switch_goes_on_under_the_new_version_with_the_kv_it_has(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    stay = driver.submit([PROMPT], policy="p", seed=1, max_tokens=20, ignore_eos=True)
    move = driver.submit([PROMPT], policy="p", seed=1, max_tokens=20, ignore_eos=True, on_update="switch")
    driver.turn(7)
    driver.push("p", driver.bundle(2))
    driver.finish(stay, move)
    (old,), (row,) = driver.rollouts(stay), driver.rollouts(move)
    (one, start, cut, fresh), (two, again, end, kv) = spans(row)
    assert (one, start, fresh, two, end, kv) == (1, 0, None, 2, 20, "carried") and 0 < cut == again < 20
    assert spans(old) == [(1, 0, 20, None)]
    assert row.token_ids[:cut] == old.token_ids[:cut] and row.token_ids != old.token_ids
    assert_near(row.logprobs, reread(driver, row), TINY.of_row(row))
    # The route of /v1/logprobs reads its spans with the same numbers.
    (scored,) = driver.score([row.prompt_ids + row.token_ids], [len(row.prompt_ids)], spans=(spans_of(row),))
    assert_near(row.logprobs, scored.logprobs, TINY.of_row(row))
    driver.turn(3)
    assert all(v.rows_in_use == 0 for v in driver.status.policies[0].versions)


def test_abort_ends_as_superseded_with_what_there_is(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = driver.submit([PROMPT], n=2, policy="p", max_tokens=200, ignore_eos=True, on_update="abort")
    pinned = driver.submit([PROMPT], policy="p@1", max_tokens=20, ignore_eos=True, on_update="abort")
    driver.turn(6)
    driver.push("p", driver.bundle(2))
    driver.finish(id, turns=3)
    for row in driver.rollouts(id):
        assert (row.finish_reason, row.stop_reason) == (FinishReason.SUPERSEDED, "p@2")
        assert spans(row) == [(1, 0, len(row.token_ids), None)] and 0 < len(row.token_ids) < 200
    driver.finish(pinned)
    assert driver.rollouts(pinned)[0].finish_reason is FinishReason.LENGTH, "a pinned row follows no name"


def test_max_staleness_ends_what_is_too_far_behind(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    patient = driver.submit([PROMPT], policy="p", max_tokens=400, ignore_eos=True, max_staleness=2)
    driver.turn(3)
    for seed in (2, 3):
        driver.push("p", driver.bundle(seed))
        driver.turn(2)
    assert not driver.over(patient)
    driver.push("p", driver.bundle(4))
    driver.finish(patient, turns=3)
    (row,) = driver.rollouts(patient)
    assert (row.finish_reason, row.stop_reason) == (FinishReason.SUPERSEDED, "p@4")


def test_a_pinned_address_grows_stale_too(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    id = driver.submit([PROMPT], policy="p@1", max_tokens=400, ignore_eos=True, max_staleness=1)
    driver.turn(3)
    driver.push("p", driver.bundle(2))
    driver.turn(2)
    assert not driver.over(id)
    driver.push("p", driver.bundle(3))
    driver.finish(id, turns=3)
    (row,) = driver.rollouts(id)
    assert (row.finish_reason, row.stop_reason) == (FinishReason.SUPERSEDED, "p@3")


def test_samples_that_start_late_follow_too(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=2)
    small.push("p", small.bundle(1))
    move = small.submit([PROMPT], n=4, policy="p", max_tokens=8, ignore_eos=True, on_update="switch")
    small.turn(3)
    small.push("p", small.bundle(2))
    end = small.submit([PROMPT], n=4, policy="p", max_tokens=30, ignore_eos=True, on_update="abort")
    small.finish(move)
    small.turn(2)
    small.push("p", small.bundle(3))
    small.finish(end)
    late = small.rollouts(move)[2:]
    assert [spans(row) for row in late] == [[(2, 0, 8, None)]] * 2, "their prompt was read again"
    assert {row.finish_reason for row in small.rollouts(end)} == {FinishReason.SUPERSEDED}
    small.turn(3)
    assert all(v.rows_in_use == 0 for v in small.status.policies[0].versions)


def test_a_row_that_is_drawn_again_begins_on_its_version_and_follows_the_name_from_there(driver: Driver) -> None:
    """It is drawn again because its replica ended, and what it asked for of later versions holds all the same."""
    driver.push("p", driver.bundle(1))
    first = driver.submit([PROMPT], policy="p", seed=1, max_tokens=20, ignore_eos=True)
    driver.finish(first)
    driver.push("p", driver.bundle(2))
    stay = driver.submit([PROMPT], policy="p", seed=1, max_tokens=20, ignore_eos=True, begins_on=1)
    end = driver.submit([PROMPT], policy="p", max_tokens=20, ignore_eos=True, on_update="abort", begins_on=1)
    driver.finish(stay, end)
    assert driver.rollouts(stay)[0].token_ids == driver.rollouts(first)[0].token_ids
    assert spans(driver.rollouts(stay)[0]) == [(1, 0, 20, None)]
    assert driver.rollouts(end)[0].finish_reason is FinishReason.SUPERSEDED
    move = driver.submit([PROMPT], policy="p", max_tokens=20, ignore_eos=True, on_update="switch", begins_on=2)
    driver.turn(7)
    driver.push("p", driver.bundle(3))
    driver.finish(move)
    (one, start, cut, _), (two, again, last, kv) = spans(driver.rollouts(move)[0])
    assert (one, start, two, last, kv) == (2, 0, 3, 20, "carried") and 0 < cut == again < 20
