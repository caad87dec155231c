"""Versions in a running batch: stamped when dispatched, finished on their own, restored bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rollout_server.engine.messages.rollouts import Admitted, AwaitsVersion
from rollout_server.engine.messages.versions import Delete, Export, Pin, Restore, RestoredVersion
from rollout_server.errors import (
    Conflict,
    PreconditionFailed,
    StalePolicy,
    UnknownPolicy,
    VersionGone,
    WeightsMemoryExceeded,
)
from rollout_server.rollout import Rollout
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.support.engine.door import broken_steps
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import assert_near

PROMPTS = prompts_of([12, 30], 286, seed=5)


def run(driver: Driver, policy: str, seed: int = 3) -> list[Rollout]:
    return driver.generate(PROMPTS, policy=policy, seed=seed, max_tokens=16, ignore_eos=True)


def stamps(row: Rollout) -> list[tuple[str, int, int, int]]:
    return [(s.version.name, s.version.number, s.start, s.end) for s in row.spans]


def test_a_swap_changes_the_output_and_swapping_back_restores_it_bit_for_bit(driver: Driver) -> None:
    base = run(driver, "base")
    driver.push("p", driver.bundle(1))
    first = run(driver, "p")
    driver.push("p", driver.bundle(2))
    second = run(driver, "p")
    assert len({tuple(row.token_ids for row in rows) for rows in (base, first, second)}) == 3
    driver.activate("p", 1)
    again = run(driver, "p")
    assert [(r.token_ids, r.logprobs) for r in again] == [(r.token_ids, r.logprobs) for r in first]
    assert all(s.version.number == 1 for row in again for s in row.spans)
    assert [(r.token_ids, r.logprobs) for r in run(driver, "base")] == [(r.token_ids, r.logprobs) for r in base]
    assert [(r.token_ids, r.logprobs) for r in run(driver, "p@2")] == [(r.token_ids, r.logprobs) for r in second]


def test_running_rows_finish_on_their_version_and_new_rows_get_the_new_one(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    expected = {k: run(driver, k) for k in ("p@1",)}
    old = driver.submit(PROMPTS, policy="p", seed=3, max_tokens=16, ignore_eos=True)
    driver.turn(6)
    assert not driver.over(old)
    push = driver.publish("p", driver.bundle(2))
    new = driver.submit(PROMPTS, policy="p", seed=3, max_tokens=16, ignore_eos=True)
    bare = driver.submit(PROMPTS, policy="base", seed=3, max_tokens=16, ignore_eos=True)
    driver.turn(2)
    assert driver.status.running == 6, "old, new and base rows share one batch"
    driver.finish(old, new, bare)
    assert driver.published(push).version.number == 2
    within = tolerance(driver, expected["p@1"])
    for row, alone in zip(driver.rollouts(old), expected["p@1"], strict=True):
        assert stamps(row) == [("p", 1, 0, 16)]
        assert_same(alone, row, within)
    for row, alone in zip(driver.rollouts(new), run(driver, "p@2"), strict=True):
        assert stamps(row) == [("p", 2, 0, 16)]
        assert_same(alone, row, within)
    for row, alone in zip(driver.rollouts(bare), run(driver, "base"), strict=True):
        assert stamps(row) == [("base", 0, 0, 16)]
        assert_same(alone, row, within)


def test_a_group_has_one_version_though_its_samples_start_apart(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, max_batch=2)
    small.push("p", small.bundle(1))
    id = small.submit([PROMPTS[0]], n=6, policy="p", max_tokens=6, ignore_eos=True)
    small.turn(3)
    small.push("p", small.bundle(2))
    small.finish(id)
    assert {s.version.number for row in small.rollouts(id) for s in row.spans} == {1}


def test_eight_versions_and_the_base_in_one_batch_equal_each_alone(driver: Driver) -> None:
    for k in range(8):
        driver.push(f"p{k}", driver.bundle(k, rank=[2, 4, 8, 16][k % 4]))
    names = ["base", *(f"p{k}" for k in range(8))]
    ids = [driver.submit(PROMPTS, policy=name, seed=1, max_tokens=12, ignore_eos=True) for name in names]
    driver.finish(*ids)
    for name, id in zip(names, ids, strict=True):
        alone = driver.generate(PROMPTS, policy=name, seed=1, max_tokens=12, ignore_eos=True)
        for one, other in zip(alone, driver.rollouts(id), strict=True):
            assert_same(one, other, tolerance(driver, [one]))
    assert len({driver.rollouts(id)[0].token_ids for id in ids}) == 9


def test_every_logprob_equals_the_scorer_under_its_version(driver: Driver) -> None:
    driver.push("p", driver.bundle(1, rank=3))
    rows = run(driver, "p")
    sequences, starts = [r.prompt_ids + r.token_ids for r in rows], [len(r.prompt_ids) for r in rows]
    within = tolerance(driver, rows)
    for row, score in zip(rows, driver.score(sequences, starts, policy="p@1"), strict=True):
        assert_near(row.logprobs, score.logprobs, within)
    wrong = driver.score(sequences, starts, policy="base")
    assert max(np.max(np.abs(np.subtract(r.logprobs, s.logprobs))) for r, s in zip(rows, wrong, strict=True)) > 0.1


def test_peft_and_mlx_lm_files_of_one_adapter_give_the_same_numbers(driver: Driver, qwen: Path) -> None:
    shapes = driver.model.info.layers.values()
    assert any(out != width for out, width in shapes), "square layers would hide a wrong transpose"
    peft, mlx = driver.bundle(4, kind="peft"), driver.bundle(4, kind="mlx")
    assert peft.digest == mlx.digest
    driver.push("peft", peft)
    first = run(driver, "peft")
    base = run(driver, "base")
    # Slots of its own: equal digests would share one.
    driver.resident.slots.unmount()
    other = Driver.start(qwen, driver.model)
    other.push("mlx", mlx)
    second = run(other, "mlx")
    assert [(r.token_ids, r.logprobs) for r in first] == [(r.token_ids, r.logprobs) for r in second]
    assert first[0].token_ids != base[0].token_ids


def test_versions_are_retained_counted_and_freed(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, keep_versions=2)
    held = None
    for k in range(6):
        small.push("p", small.bundle(k))
        if k == 0:
            held = small.submit([PROMPTS[0]], policy="p", max_tokens=400, ignore_eos=True)
            small.turn(3)
    line = small.status.policies[0]
    assert [v.version.number for v in line.versions] == [1, 5, 6], "1 is in use"
    assert line.versions[0].rows_in_use == 1 and line.live is not None and line.live.number == 6
    with pytest.raises(VersionGone, match="p@3"):
        small.score([PROMPTS[0]], policy="p@3")
    assert held is not None
    small.abort(held)
    small.finish(held)
    small.turn(3)
    assert [v.version.number for v in small.status.policies[0].versions] == [5, 6]
    with pytest.raises(VersionGone):
        small.score([PROMPTS[0]], policy="p@1")
    assert small.resident.slots.slots_in_use == 2


def test_the_same_content_pushed_again_changes_nothing(driver: Driver) -> None:
    first = driver.push("p", driver.bundle(1))
    again = driver.push("p", driver.bundle(1), label="second", if_match="99")
    assert (first.unchanged, again.unchanged) == (False, True)
    assert again.version.number == 1 and again.version.label == "second"


def test_staged_only_then_activated(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    staged = driver.push("p", driver.bundle(2), activate=False)
    assert not staged.live and run(driver, "p")[0].spans[0].version.number == 1
    assert run(driver, f"p@{staged.version.digest[:20]}")[0].spans[0].version.number == 2
    driver.activate("p", 2)
    assert run(driver, "p")[0].spans[0].version.number == 2


def test_wrong_addresses_and_conditions_are_refused_by_name(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    for policy, error in (("q", UnknownPolicy), ("p@9", UnknownPolicy), ("base@1", UnknownPolicy)):
        id = driver.submit([PROMPTS[0]], policy=policy)
        driver.finish(id)
        assert isinstance(driver.error(id), error)
    id = driver.submit([PROMPTS[0]], policy="p", min_version=2)
    driver.finish(id)
    assert isinstance(driver.error(id), StalePolicy)
    with pytest.raises(PreconditionFailed):
        driver.push("p", driver.bundle(2), if_match="7")
    assert run(driver, "p")[0].spans[0].version.number == 1


def test_no_reference_is_left_behind(driver: Driver, qwen: Path) -> None:
    """Whatever way rows end, nothing holds the version afterwards."""
    small = Driver.start(qwen, driver.model, max_batch=3, prefill_tokens=16)
    small.push("p", small.bundle(1))
    ids = []
    for k in range(12):
        ids.append(small.submit(prompts_of([60, 5], 286, seed=k), n=3, policy="p", max_tokens=1 + k, stop=("e",)))
        small.turn(k % 4)
        if k % 3 == 0:
            small.abort(ids[-1])
        if k == 7:
            with broken_steps(small.batch(0)):
                small.turn(2)
    small.finish(*ids)
    small.turn(4)
    assert small.status.policies[0].versions[0].rows_in_use == 0
    assert (small.status.running, small.status.waiting) == (0, 0)
    for id in ids:
        rows = small.rollouts(id)
        assert [(r.prompt_index, r.sample_index) for r in rows] == [(p, s) for p in range(2) for s in range(3)]
        ends = [e for e in small.events if type(e).__name__ in ("RequestDone", "RequestFailed") and e.id == id]
        assert len(ends) == 1, "exactly one terminal event"


def test_a_deleted_version_serves_its_rows_to_the_end_and_nobody_else(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    expected = run(driver, "p")
    held = driver.submit(PROMPTS, policy="p", n=2, seeds=[[1, 2], [3, 4]], max_tokens=40, ignore_eos=True)
    driver.turn(4)
    driver.push("p", driver.bundle(2))
    with pytest.raises(Conflict, match="p@2 is live"):
        driver.change(Delete("", "p", 2))
    gone = driver.change(Delete("", "p", 1))
    assert (gone.numbers, gone.rows_in_use, gone.last) == ((1,), 4, 2)
    assert not driver.over(held), "it did not wait"
    assert [v.version.number for v in driver.status.policies[0].versions] == [2]
    with pytest.raises(VersionGone):
        driver.score([PROMPTS[0]], policy="p@1")
    assert driver.resident.slots.slots_in_use == 2
    driver.finish(held)
    driver.turn(2)
    assert driver.resident.slots.slots_in_use == 1
    assert driver.registry.nbytes == driver.bundle(2).nbytes
    for row in driver.rollouts(held):
        assert stamps(row) == [("p", 1, 0, 40)]
    again = driver.push("q", driver.bundle(1))
    assert again.version.number == 1 and run(driver, "q")[0].token_ids == expected[0].token_ids


def test_a_deleted_name_goes_on_with_its_numbers(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    driver.push("p", driver.bundle(2))
    assert driver.change(Delete("", "p")).numbers == (1, 2)
    assert driver.status.policies == () and driver.resident.slots.slots_in_use == 0
    for policy, error in (("p", UnknownPolicy), ("p@2", VersionGone)):
        with pytest.raises(error):
            driver.score([PROMPTS[0]], policy=policy)
    assert driver.push("p", driver.bundle(2)).version.number == 3


def test_a_pinned_version_outlives_its_age(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, keep_versions=1)
    small.push("p", small.bundle(1))
    assert small.change(Pin("", "p", 1, True)).status.pinned
    first = run(small, "p@1")
    for seed in (2, 3, 4):
        small.push("p", small.bundle(seed))
    assert [v.version.number for v in small.status.policies[0].versions] == [1, 4]
    assert run(small, "p@1")[0].logprobs == first[0].logprobs
    small.change(Pin("", "p", 1, False))
    with pytest.raises(VersionGone):
        small.change(Pin("", "p", 1, True))
    small.resident.slots.unmount()


def test_an_export_is_the_bundle_that_was_pushed_while_it_is_kept(driver: Driver, qwen: Path) -> None:
    small = Driver.start(qwen, driver.model, keep_versions=1)
    bundle = small.bundle(1)
    small.push("p", bundle)
    assert small.change(Export("", "p", 1)).bundle is bundle
    small.push("p", small.bundle(2))
    with pytest.raises(VersionGone):
        small.change(Export("", "p", 1))
    assert set(small.bundles_held) == {small.bundle(2).digest}, "freed with the version"
    small.resident.slots.unmount()


def test_a_restored_name_serves_the_same_numbers(driver: Driver, qwen: Path) -> None:
    driver.push("p", driver.bundle(1))
    expected = run(driver, "p")
    driver.resident.slots.unmount()
    fresh = Driver.start(qwen, driver.model)
    versions = tuple(
        RestoredVersion(number, fresh.bundle(number), f"step-{number}", 1.5, number == 1, number == 3)
        for number in (1, 3)
    )
    fresh.change(Restore("", "p", 5, versions))
    (line,) = fresh.status.policies
    assert line.live is not None and (line.live.number, line.live.label, line.last) == (1, "step-1", 5)
    assert [(v.version.number, v.pinned, v.created) for v in line.versions] == [(1, False, 1.5), (3, True, 1.5)]
    rows = run(fresh, "p")
    assert [(r.token_ids, r.logprobs) for r in rows] == [(r.token_ids, r.logprobs) for r in expected]
    assert fresh.push("p", fresh.bundle(9)).version.number == 6
    fresh.resident.slots.unmount()
    small = Driver.start(qwen, driver.model, weights_memory=fresh.bundle(1).nbytes + 1)
    with pytest.raises(WeightsMemoryExceeded):
        small.change(Restore("", "r", 5, versions))
    assert small.status.policies == () and not small.bundles_held


def test_a_replica_follows_numbers_keeps_what_it_is_not_told_to_free_and_tells_of_admissions(
    driver: Driver, qwen: Path
) -> None:
    """What a controller needs of an engine that follows it: two phases under its number, and retention by command."""
    follower = Driver.start(qwen, driver.model, keep_versions=None, tell_admissions=True)
    for number in (3, 1, 9):
        staged = follower.push("p", follower.bundle(number), number=number, provisional=True)
        assert (staged.version.number, staged.live) == (number, False)
    flipped = follower.push("p", follower.bundle(3), number=3, label="three")
    assert flipped.live and flipped.unchanged and flipped.version.label == "three"
    id = follower.submit(PROMPTS, policy="p", max_tokens=3, ignore_eos=True)
    follower.finish(id)
    admitted = [event for event in follower.events if isinstance(event, Admitted)]
    assert [(a.id, a.prompt_index, a.version.number) for a in admitted] == [(id, 0, 3), (id, 1, 3)]
    waiting = follower.submit(PROMPTS, policy="p", min_version=4, wait_s=60.0)
    follower.turn(3)
    awaits = [event for event in follower.events if isinstance(event, AwaitsVersion)]
    assert [(a.id, a.prompt_index) for a in awaits] == [(waiting, 0), (waiting, 1)]
    assert [kept.version.number for kept in follower.status.policies[0].versions] == [1, 3, 9]
    follower.change(Delete("", "p", 1))
    assert [kept.version.number for kept in follower.status.policies[0].versions] == [3, 9]
    driver.push("p", driver.bundle(1))
    driver.generate(PROMPTS, policy="p", max_tokens=3)
    driver.submit(PROMPTS, policy="p", min_version=4, wait_s=60.0)
    driver.turn(3)
    assert not any(isinstance(event, Admitted | AwaitsVersion) for event in driver.events), "nobody asked for it"
