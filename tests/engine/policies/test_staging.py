"""A push is staged in slices between the steps of rows that go on decoding, and leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import adapters.resident.residency
import adapters.resident.slots
import adapters.resident.staging
from adapters.prepare import prepare
from adapters.resident.staging import BESIDE_BYTES, written_beside
from adapters.tensors import AdapterTensor
from rollout_server.engine.messages.versions import PolicyReply
from rollout_server.errors import AdapterMismatch, EngineFault, UnknownPolicy
from rollout_server.rollout import Wants
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.laws.grids import some_long
from tests.support.engine.door import FIRE
from tests.support.engine.driver import Driver, prompts_of

PROMPTS = prompts_of([12, 30], 286, seed=5)


@pytest.fixture(params=[False, True], ids=["settled", "beside"])
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether low-rank versions are written behind the step in flight, as on a GPU."""
    chosen = bool(request.param)
    monkeypatch.setattr(adapters.resident.slots, "written_beside", lambda nbytes, device: chosen)
    return chosen


@pytest.fixture
def slow(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that writes one layer in a turn, and multiplies with few."""
    monkeypatch.setattr(adapters.resident.residency, "WRITE_S", 0.0)
    monkeypatch.setattr(adapters.resident.staging, "WRITE_BYTES", 1)
    monkeypatch.setattr(adapters.resident.slots, "TURNS", 8)


def answered(driver: Driver, id: str) -> bool:
    return any(isinstance(event, PolicyReply) and event.id == id for event in driver.events)


def turns_until_answered(driver: Driver, id: str, watched: str) -> list[int]:
    """Tokens that the watched request has got after each turn until the push was answered."""
    counts = []
    while not answered(driver, id):
        assert driver.error(id) is None and len(counts) < 200
        driver.turn()
        counts.append(len(driver.tokens(watched)))
    return counts


def watched(driver: Driver, policy: str, **options: Any) -> str:
    wants = Wants(tokens_as_they_come=True)
    return driver.submit(PROMPTS, policy=policy, seed=3, ignore_eos=True, wants=wants, **options)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dora", some_long([False, True], True))
def test_rows_decode_at_every_turn_while_a_version_is_staged(driver: Driver, qwen: Path, dora: bool) -> None:
    driver.push("p", driver.bundle(1))
    alone = driver.generate(PROMPTS, policy="p", seed=3, max_tokens=70, ignore_eos=True)
    running = watched(driver, "p", max_tokens=70)
    driver.turn(4)
    second = driver.bundle(2, rank=8, dora=dora)
    push = driver.publish("p", second, prepared=prepare(second, "float32"))
    counts = turns_until_answered(driver, push, running)
    layers = len(second.spec.modules)
    assert len(counts) >= layers, "one layer a turn"
    assert all(later > earlier for earlier, later in itertools.pairwise(counts)), "no turn without a token"
    new = driver.submit(PROMPTS, policy="p", seed=3, max_tokens=16, ignore_eos=True)
    driver.finish(running, new)
    within = tolerance(driver, alone)
    for one, other in zip(alone, driver.rollouts(running), strict=True):
        assert_same(one, other, within)
    assert {s.version.number for row in driver.rollouts(new) for s in row.spans} == {2}
    # Staged at once, on an engine that does nothing else, it is the same version.
    driver.resident.slots.unmount()
    fresh = Driver.start(qwen, driver.model)
    fresh.push("q", second)
    expected = fresh.generate(PROMPTS, policy="q", seed=3, max_tokens=16, ignore_eos=True)
    for one, other in zip(expected, driver.rollouts(new), strict=True):
        assert_same(one, other, tolerance(driver, expected))


@pytest.mark.usefixtures("slow")
def test_the_step_in_flight_is_waited_for_only_where_what_it_reads_is_written(
    driver: Driver, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = driver.batches
    waits, settle = list[int](), batches.settle
    monkeypatch.setattr(batches, "settle", lambda: (waits.append(1), settle())[1])
    driver.push("p", driver.bundle(1))
    running = watched(driver, "p", max_tokens=60)
    driver.turn(4)
    waits.clear()
    turns_until_answered(driver, driver.publish("p", driver.bundle(2)), running)
    assert bool(waits) != beside
    waits.clear()
    turns_until_answered(driver, driver.publish("p", driver.bundle(3), mode="merged"), running)
    assert waits, "the weights of a step in flight"
    driver.finish(running)


def test_a_cpu_and_large_stacks_wait() -> None:
    assert written_beside(BESIDE_BYTES, "cuda") and not written_beside(BESIDE_BYTES + 1, "cuda")
    assert not written_beside(1, "metal") and not written_beside(1, None)


@pytest.mark.usefixtures("slow")
def test_gains_are_of_the_base_while_rows_run_on_another_parameter_set(driver: Driver, qwen: Path) -> None:
    driver.push("merged", driver.bundle(1, rank=8), mode="merged")
    running = watched(driver, "merged", max_tokens=70)
    driver.turn(4)
    second = driver.bundle(2, dora=True)
    counts = turns_until_answered(driver, driver.publish("p", second), running)
    assert len(counts) >= len(second.spec.modules)
    assert all(later > earlier for earlier, later in itertools.pairwise(counts)), "no turn without a token"
    rows = driver.generate(PROMPTS, policy="p", seed=3, max_tokens=16, ignore_eos=True)
    fresh = Driver.start(qwen)
    fresh.push("q", second)
    expected = fresh.generate(PROMPTS, policy="q", seed=3, max_tokens=16, ignore_eos=True)
    for one, other in zip(expected, rows, strict=True):
        assert_same(one, other, tolerance(driver, expected))


@pytest.mark.usefixtures("slow")
def test_who_asks_for_a_name_that_is_under_way_waits_for_it(driver: Driver) -> None:
    driver.push("other", driver.bundle(9))
    running = watched(driver, "other", max_tokens=70)
    driver.turn(4)
    push = driver.publish("p", driver.bundle(1, dora=True))
    first, exact, unknown = (driver.submit(PROMPTS[:1], policy=name, max_tokens=4) for name in ("p", "p@1", "nobody"))
    driver.turn(3)
    assert not answered(driver, push) and driver.error(first) is None and driver.error(exact) is None
    driver.finish(first, exact, unknown)
    assert answered(driver, push) and not driver.over(running)
    assert {s.version.number for id in (first, exact) for row in driver.rollouts(id) for s in row.spans} == {1}
    assert isinstance(driver.error(unknown), UnknownPolicy)


@pytest.mark.usefixtures("slow")
def test_a_version_refused_in_the_middle_of_its_staging_leaves_nothing(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    running = watched(driver, "p", max_tokens=200)
    driver.turn(4)
    bundle = driver.bundle(2, dora=True)
    magnitude = f"{list(bundle.spec.modules)[-1]}.lora_magnitude_vector"
    infinite = AdapterTensor("F32", np.full_like(bundle.tensors[magnitude].array, 3e38))
    push = driver.publish("p", replace(bundle, tensors={**bundle.tensors, magnitude: infinite}))
    with pytest.raises(AdapterMismatch, match="magnitude"):
        driver.published(push)
    assert driver.resident.slots.slots_in_use == 1
    assert driver.push("p", driver.bundle(3, dora=True)).version.number == 2
    driver.finish(running)
    assert len(driver.rollouts(running)) == 2 and all(len(row.token_ids) == 200 for row in driver.rollouts(running))


@pytest.mark.usefixtures("slow")
def test_a_fault_in_the_middle_of_staging_fails_the_push_by_name(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.push("p", driver.bundle(1))
    expected = driver.generate(PROMPTS, policy="p", seed=3, max_tokens=8, ignore_eos=True)
    slots = driver.resident.slots
    writes, write = [], slots._write

    def failing(staging: Any) -> None:
        writes.append(staging)
        if len(writes) == 3:
            raise MemoryError("no more")
        write(staging)

    monkeypatch.setattr(slots, "_write", failing)
    running = watched(driver, "p", max_tokens=60)
    driver.turn(4)
    push = driver.publish("p", driver.bundle(2))
    with pytest.raises(EngineFault, match="no more"):
        driver.published(push)
    driver.finish(running)
    again = driver.generate(PROMPTS, policy="p", seed=3, max_tokens=8, ignore_eos=True)
    assert [(r.token_ids, r.logprobs) for r in again] == [(r.token_ids, r.logprobs) for r in expected]
    assert driver.push("p", driver.bundle(2)).version.number == 2


def test_pushes_under_load_leak_nothing(qwen: Path) -> None:
    """Of 30 pushes with four kept: slots, bundles, stacks and the device's memory are flat after the first twelve."""
    gc.collect()
    gc.freeze()  # What other tests left behind is not looked through after each push.
    driver = Driver.start(qwen, keep_versions=4)
    seen: list[tuple[int, ...]] = []
    for step in range(30):
        rows = driver.submit(PROMPTS[:1], policy="p" if step else "base", n=2, max_tokens=6, ignore_eos=True)
        driver.turn(2)
        bundle = driver.bundle(step, dora=step % 3 == 2)
        driver.push("p", bundle, prepared=prepare(bundle, "float32"))
        driver.finish(rows)
        mx.synchronize()
        gc.collect()  # Arrays in circles of Python objects are freed when somebody looks for those.
        seen.append(
            (
                driver.resident.slots.slots_in_use,
                len(driver.bundles_held),
                driver.policies.slot_bytes,
                mx.get_active_memory(),
            )
        )
    assert [v.version.number for v in driver.status.policies[0].versions] == [27, 28, 29, 30]
    slots, bundles, stacks, memory = zip(*seen[12:], strict=True)
    assert set(slots) == {4} and set(bundles) == {4} and len(set(stacks)) == 1
    # A leak would keep 17 versions; what other tests of this process left may be freed meanwhile.
    assert memory[-1] - memory[0] < 2 * bundle.nbytes, seen


def test_what_fails_in_the_middle_gives_its_memory_back(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    write = adapters.resident.slots.AdapterSlots._write

    def broken(*arguments: Any) -> None:
        write(*arguments)
        raise ValueError(FIRE)

    with monkeypatch.context() as patch:
        patch.setattr(adapters.resident.slots.AdapterSlots, "_write", broken)
        with pytest.raises(EngineFault, match=FIRE):
            driver.push("p", driver.bundle(1))
    assert not driver.status.policies and driver.status.slot_bytes == 0
    assert driver.push("p", driver.bundle(1)).version.number == 1 and driver.status.slot_bytes > 0
