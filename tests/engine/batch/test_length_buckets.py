"""Length buckets: what is decided, and that rows do not notice."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from rollout_server.engine.batch.length_buckets import MEASURED_CELLS, MOST_BUCKETS, Shape, StepCosts, cheapest, plan
from rollout_server.engine.kv_cache.sizes import row_bucket
from rollout_server.engine.messages.control import Stop
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.support.engine.door import broken_steps
from tests.support.engine.driver import Driver, prompts_of

COSTS = StepCosts(weights=0.01, cell=4e-6)
FREE = StepCosts(weights=0.0, cell=1.0)
"""Another pass costs nothing: classes wherever lengths differ."""


def places(rows: int) -> int:
    return row_bucket(rows, 64)


def step(widths: list[int], classes: list[int], costs: StepCosts = COSTS) -> float:
    members = {n: [w for w, at in zip(widths, classes, strict=True) if at == n] for n in set(classes)}
    return sum(costs.of(places(len(rows)), max(rows)) for rows in members.values())


def test_one_long_row_gets_a_class_of_its_own() -> None:
    assert plan([128] * 31 + [4096], [0] * 32, COSTS, places) == [0] * 31 + [1]
    shapes = [Shape(31, 128)]
    assert cheapest(shapes, 1, 4096, COSTS, may_open=True) == 1
    assert cheapest(shapes, 1, 4096, COSTS, may_open=False) == 0
    assert cheapest([*shapes, Shape(1, 4096)], 1, 130, COSTS, may_open=True) == 0


def test_a_class_that_saves_less_than_a_pass_is_not_opened() -> None:
    assert plan([100] * 31 + [160], [0] * 32, COSTS, places) is None
    assert plan([128] * 31 + [4096], [0] * 32, StepCosts(weights=10.0, cell=4e-6), places) is None
    assert cheapest([Shape(31, 100)], 1, 160, COSTS, may_open=True) == 0


def test_rows_that_differ_by_when_they_joined_share_a_class() -> None:
    """Groups of one job come one after another, while those before them have begun to decode; and where a batch has
    just filled its places, twice as many are computed for the next group."""
    for costs in (COSTS, StepCosts(weights=0.001, cell=1e-4)):
        for rows in range(8, 256, 8):
            assert cheapest([Shape(rows, 256 + rows // 4)], 8, 256, costs, may_open=True) == 0
            assert cheapest([Shape(rows, 256)], 8, 280, costs, may_open=True) == 0
    # Before any step costs something, whatever it costs.
    assert cheapest([Shape(8, 256)], 8, 256, FREE, may_open=True) == 0


def test_classes_merge_when_they_are_worth_it_no_more() -> None:
    assert plan([128] * 20 + [160], [0] * 20 + [1], COSTS, places) == [0] * 21
    assert plan([4000, 4096], [0, 2], COSTS, places) in ([0, 0], [2, 2])


def test_a_row_that_outgrows_its_class_is_moved_and_none_bounces() -> None:
    widths, classes = [128] * 31 + [4096], [0] * 31 + [1]
    moves = 0
    for _ in range(400):
        # One of the short ones is on its way to a long length.
        widths[0] += 8
        found = plan(widths, classes, COSTS, places)
        if found is not None:
            moves += sum(a != b for a, b in zip(classes, found, strict=True))
            classes = found
    assert classes[0] != classes[1], "it left the short ones"
    assert moves <= 4


def test_a_plan_is_always_much_cheaper_and_settles() -> None:
    dice = random.Random(3)
    changed = 0
    for _ in range(150):
        rows = dice.randrange(1, 64)
        widths = [int(2 ** dice.uniform(3, 13)) for _ in range(rows)]
        classes = [dice.randrange(MOST_BUCKETS) for _ in range(rows)]
        costs = StepCosts(10 ** dice.uniform(-3, 0), 10 ** dice.uniform(-7, -4))
        found = plan(widths, classes, costs, places)
        if found is not None:
            changed += 1
            assert len(set(found)) <= MOST_BUCKETS
            assert step(widths, found, costs) < step(widths, classes, costs)
            assert plan(widths, found, costs, places) is None
    assert changed > 50


@pytest.mark.parametrize(
    "costs", [FREE, pytest.param(StepCosts(1.0, 0.0), marks=pytest.mark.long)], ids=["classes", "one batch"]
)
def test_rows_do_not_notice_their_class(base: Driver, costs: StepCosts) -> None:
    prompts = prompts_of([3, 700, 40, 5, 350, 9, 120], 286, seed=2)

    def ask() -> list[str]:
        return [base.submit([p], seed=7 + i, max_tokens=60, ignore_eos=True) for i, p in enumerate(prompts)]

    # All in one batch, where a row is what it is alone (`test_batch`).
    together = ask()
    base.finish(*together)
    base.set_step_costs(costs)
    ids = ask()
    base.turn(6)
    assert base.batches.classes(0) > 1 if costs is FREE else base.batches.classes(0) == 1
    # A plan that changes moves rows with what they have.
    base.turn(10)
    base.set_step_costs(StepCosts(1.0, 0.0))
    base.turn(17)
    assert base.batches.classes(0) == 1
    base.set_step_costs(FREE)
    base.turn(17)
    assert base.batches.classes(0) == MOST_BUCKETS
    base.finish(*ids)
    for id, other in zip(ids, together, strict=True):
        (expected,) = base.rollouts(other)
        assert_same(expected, base.rollouts(id)[0], tolerance(base, [expected]))
    base.turn(2)
    assert base.batches.classes(0) == 0


def test_costs_are_measured_before_the_first_turn(base: Driver) -> None:
    """While rows run they would all wait for it."""
    base.set_step_costs(None)
    base.send(Stop())
    base.engine.run()
    costs = base.step_costs
    assert costs is not None and costs.weights > 0 and costs.cell >= 0


def test_costs_are_not_measured_where_that_would_not_fit(base: Driver) -> None:
    base.set_step_costs(None)
    base.set_kv_limit(MEASURED_CELLS - 1)
    base.batches.learn_costs()
    assert base.step_costs is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_failed_step_of_one_class_leaves_the_others(
    qwen: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The way of compiled steps is what matters here, and a CPU would have a C++ compiler make every one of them.
    monkeypatch.setattr(mx, "compile", lambda step: step)
    driver = Driver.start(qwen, max_batch=64, compile_decode=compiled)
    assert driver.model.compiles == compiled
    driver.set_step_costs(FREE)
    short, long = prompts_of([4, 600], 286)
    ids = [driver.submit([p], seed=5, max_tokens=30, ignore_eos=True) for p in (short, long)]
    driver.turn(6)
    assert driver.batches.classes(0) == 2
    with broken_steps(driver.batch(0, 0)):
        driver.finish(*ids)
    (one,), (other,) = driver.rollouts(ids[0]), driver.rollouts(ids[1])
    assert (one.error is None) != (other.error is None)
    assert len(next(row for row in (one, other) if row.error is None).token_ids) == 30
