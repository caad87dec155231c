"""Rows that are read as they come, beside what is read: by a clock that the tests hold."""

from __future__ import annotations

import statistics

import pytest

from rollout_server.engine.scheduling.latency import LEAST
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from tests.support.engine.turn_clock import Cost, TurnClock, linear


def latency(clock: TurnClock, most: int = 512) -> TurnBudget:
    return TurnBudget(most, clock, prefer="latency")


@pytest.mark.parametrize(
    ("step", "cost", "least"),
    [
        (0.05, linear(0.0015), 28),
        # A GPU: the weights are read whatever the number of tokens.
        (0.008, linear(0.00002, fixed=0.004), 150),
        (0.05, linear(1e-6), 400),
    ],
)
def test_what_fits_is_read_in_every_turn(step: float, cost: Cost, least: int) -> None:
    clock = TurnClock()
    budget = latency(clock)
    clock.turns(budget, step, cost, "prefill", count=60)
    found = clock.turns(budget, step, cost, "prefill")
    assert sum(tokens > 0 for tokens, _ in found) >= 0.85 * len(found)
    assert all(seconds <= 2.02 * step for _, seconds in found)
    assert all(tokens >= least for tokens, _ in found if tokens)


@pytest.mark.parametrize(
    ("step", "cost", "bound"),
    [
        (0.035, linear(0.0007, fixed=0.028), 2.4),
        # A pass alone takes as long as a step.
        (0.01, linear(0.00001, fixed=0.01), 2.4),
        # The least there is takes much longer than a step.
        (0.01, linear(0.005), 5.1),
    ],
)
def test_what_does_not_fit_is_read_seldom(step: float, cost: Cost, bound: float) -> None:
    clock = TurnClock()
    budget = latency(clock)
    clock.turns(budget, step, cost, "prefill", count=400)
    found = clock.turns(budget, step, cost, "prefill")
    seconds = [seconds for _, seconds in found]
    assert statistics.median(seconds) <= 2 * step and statistics.mean(seconds) <= 2 * step
    assert max(seconds) <= bound * step
    # It gets on as fast as with the few tokens that would fit, or faster.
    fits = max((n for n in range(LEAST, 513) if cost(n) <= step), default=LEAST)
    assert sum(tokens for tokens, _ in found) / sum(seconds) >= 0.9 * fits / (step + cost(fits)) / 2


def test_the_measure_is_the_undisturbed_turn_not_the_one_beside_reading() -> None:
    """A turn that reads costs more than the step and the reading: the step in flight is waited for first."""
    clock = TurnClock()
    budget = latency(clock)
    found = clock.turns(budget, 0.05, linear(0.001, fixed=0.015), "prefill", count=160)[80:]
    assert all(seconds <= 0.101 for _, seconds in found)


def test_one_slow_turn_decides_nothing() -> None:
    clock, cost = TurnClock(), linear(0.001)
    budget = latency(clock)
    clock.turns(budget, 0.05, cost, "prefill")
    (stalled, _), *after = [
        *clock.turns(budget, 3.0, cost, "prefill", count=1),
        *clock.turns(budget, 0.05, cost, "prefill", count=20),
    ]
    read = [tokens for tokens, _ in after if tokens]
    assert min(read) >= 0.7 * stalled and read[-1] == pytest.approx(stalled, rel=0.1)
    assert [tokens for tokens, _ in after[:6]].count(0) <= 5


def test_a_slower_step_leaves_more_and_a_faster_one_less() -> None:
    clock, cost = TurnClock(), linear(0.001)
    budget = latency(clock)
    for step in (0.05, 0.1, 0.04):
        clock.turns(budget, step, cost, "prefill", count=150)
        read = [tokens for tokens, _ in clock.turns(budget, step, cost, "prefill", count=9) if tokens]
        assert read[-1] == pytest.approx(step * 950, rel=0.1)


def test_fewer_rows_have_an_undisturbed_turn_of_their_own() -> None:
    clock, cost = TurnClock(), linear(0.001)
    budget = latency(clock)
    for rows, step in ((32, 0.1), (4, 0.03)):
        for _ in range(3):
            clock.turn(budget, step, cost, rows=rows)
    for _ in range(60):
        clock.turn(budget, 0.1, cost, "prefill", rows=32)
    found = [clock.turn(budget, 0.03, cost, "prefill", rows=4).get("prefill", 0) for _ in range(40)]
    assert 24 <= max(found) <= 30, "at once, since both costs are known"


def test_two_kinds_take_turns_while_rows_decode() -> None:
    clock, cost = TurnClock(), linear(0.001)
    budget = latency(clock)
    clock.turn(budget, 0.05, cost)
    served = [tuple(clock.turn(budget, 0.05, cost, "prefill", "scoring")) for _ in range(6)]
    assert served == [("prefill",), ("scoring",)] * 3
    # Whoever is alone reads every turn, but for those that show what is undisturbed.
    alone = [tuple(clock.turn(budget, 0.05, cost, "scoring")) for _ in range(9)]
    assert set(alone) == {("scoring",), ()} and alone.count(()) <= 2


def test_a_small_budget_is_the_most_there_is() -> None:
    clock = TurnClock()
    budget = latency(clock, 5)
    for cost in (linear(1e-6), linear(1.0)):
        assert {tokens for tokens, _ in clock.turns(budget, 0.05, cost, "prefill")} == {0, 5}


def test_a_pass_that_outlasts_many_steps_does_not_shrink_chunks() -> None:
    """A GPU whose forwards that read are bound by the host: chunks are worth their pass, and paid for by turns."""
    clock, step, cost = TurnClock(), 0.015, linear(0.000005, fixed=0.06)
    budget = latency(clock, 8192)
    clock.turns(budget, step, cost, "prefill", count=200)
    found = clock.turns(budget, step, cost, "prefill", count=200)
    assert statistics.median(seconds for _, seconds in found) <= 2 * step
    assert max(tokens for tokens, _ in found) == 8192
    assert sum(seconds for _, seconds in found) <= 2.1 * step * len(found)


@pytest.mark.parametrize("stall", [10.0, 1.0])
def test_a_stall_while_reading_is_forgotten(stall: float) -> None:
    """As where a shape is computed for the first time."""
    clock, cost = TurnClock(), linear(0.001)
    budget = latency(clock)
    before = clock.turns(budget, 0.05, cost, "prefill")
    clock.turns(budget, 0.05, lambda tokens: cost(tokens) + stall, "prefill", count=1)
    after = clock.turns(budget, 0.05, cost, "prefill", count=20)
    usual = max(tokens for tokens, _ in before[-9:])
    assert max(tokens for tokens, _ in after[6:]) == pytest.approx(usual, rel=0.1)
    assert [tokens for tokens, _ in after].count(0) <= 8
