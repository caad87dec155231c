"""Memory that nobody uses is given back, on request and at rest; rows that run do not notice."""

from __future__ import annotations

import mlx.core as mx
import pytest

from rollout_server.engine.messages.control import Release, Released
from rollout_server.engine.scheduling.idle_memory import IDLE_S
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.support.engine.driver import Driver, prompts_of


def released(driver: Driver) -> Released:
    driver.count += 1
    id = f"release{driver.count}"
    driver.send(Release(id))
    driver.until(lambda: any(isinstance(event, Released) and event.id == id for event in driver.events))
    return next(event for event in driver.events if isinstance(event, Released) and event.id == id)


def test_release_gives_back_what_no_row_needs(base: Driver) -> None:
    (prompt,) = prompts_of([20], 286)
    expected = base.generate([prompt], n=2, seed=3, max_tokens=60, ignore_eos=True)
    base.generate(prompts_of([600] * 3, 286), n=5, max_tokens=3, ignore_eos=True)
    id = base.submit([prompt], n=2, seed=3, max_tokens=60, ignore_eos=True)
    base.generate(prompts_of([600], 286), n=9, max_tokens=3, ignore_eos=True)
    before, wide = mx.get_active_memory(), base.batches.nbytes
    reply = released(base)
    assert 0 < base.batches.nbytes < wide / 4, "two rows of fewer than 80 tokens run"
    assert 0 < reply.kv_bytes <= wide - base.batches.nbytes <= before - mx.get_active_memory() + 65536
    assert reply.nbytes >= reply.kv_bytes
    memory = base.status.memory
    assert 0 < memory.kv_filled <= memory.kv_held == base.batches.nbytes < memory.kv_limit
    base.finish(id)
    for one, other in zip(expected, base.rollouts(id), strict=True):
        assert_same(one, other, tolerance(base, [one]))
    assert released(base).kv_bytes > 0
    assert base.batches.nbytes == 0 == base.status.memory.kv_held
    assert base.generate([prompt], n=2, seed=3, max_tokens=60, ignore_eos=True)[1].token_ids == expected[1].token_ids


def test_an_idle_engine_gives_its_kv_back(base: Driver) -> None:
    now = 0.0
    base.set_memory_clock(lambda: now)
    base.generate(prompts_of([300], 286), n=4, max_tokens=3, ignore_eos=True)
    memory = base.memory
    base.turn(2)
    memory.rest(False)
    assert base.batches.nbytes
    now = IDLE_S - 0.1
    memory.rest(False)
    assert base.batches.nbytes
    memory.rest(True)
    now = 2 * IDLE_S
    memory.rest(False)
    assert base.batches.nbytes, "it had work in between"
    now = 3 * IDLE_S
    memory.rest(False)
    assert base.batches.nbytes == 0 and mx.get_cache_memory() == 0


def test_the_parts_are_counted(driver: Driver) -> None:
    driver.push("p", driver.bundle(1))
    driver.turn(0)
    memory = driver.memory_now()
    weights = driver.model.info.weight_bytes
    assert memory.weights == weights > 0 and memory.slots == driver.status.slot_bytes > 0
    assert memory.active >= weights + memory.slots and memory.peak >= memory.active - 4096


@pytest.mark.long
def test_arrays_grow_by_half_as_much_again_while_there_is_room(base: Driver) -> None:
    widths = set()

    def grow(cells: int | None) -> int:
        if cells:
            base.set_kv_limit(cells)
        widths.clear()
        id = base.submit(prompts_of([20], 286), n=2, max_tokens=500, ignore_eos=True)
        while not base.over(id):
            base.turn()
            widths.add(base.batch(0).store.columns)
        return len(widths)

    assert grow(None) <= 9
    free = max(widths)
    # Three quarters of this is less than the rows come to: then they take what they need.
    grow(2 * 544)
    assert max(widths) <= 544 < free and base.rollouts("r2")[1].token_ids == base.rollouts("r1")[1].token_ids


def test_a_version_that_comes_or_goes_is_counted_though_nobody_looks_for_long(driver: Driver) -> None:
    driver.set_memory_clock(lambda: 0.0)
    held = driver.status.memory.slots
    driver.push("counted", driver.bundle(1))
    assert driver.status.memory.slots == driver.policies.slot_bytes > held
