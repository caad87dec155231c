"""Rows that are read as they come, beside what is read: by a clock that the tests hold."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from rollout_server.engine.scheduling.latency import (
    EVERY_TURN,
    FIRST,
    FIRST_LOOK,
    LATEST,
    LEAST,
    LOOK_EVERY,
    MOST_OWED,
    SELDOM,
)
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scheduling.turn_costs import UNDISTURBED
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


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_what_a_turn_costs_beside_its_reading_is_left_for_it(share: float) -> None:
    """The next step is built while none runs: a twentieth of a turn on two processors, a seventh on one. Else every
    second turn would be left out for one that is a little too long."""
    clock, step, cost = TurnClock(beside=share * 0.05), 0.05, linear(0.0005)
    budget = latency(clock)
    clock.turns(budget, step, cost, "scoring")
    found = clock.turns(budget, step, cost, "scoring")
    assert max(seconds for _, seconds in found) <= 2 * step
    fits = round((EVERY_TURN - share) * step / 0.0005)
    assert statistics.median(tokens for tokens, _ in found) >= fits - 1, "whole tokens"
    # What else is read has costs of its own.
    clock.beside = 0.0
    clock.turns(budget, step, cost, "prefill")
    assert (
        max(tokens for tokens, _ in clock.turns(budget, step, cost, "prefill")) >= round(EVERY_TURN * step / 0.0005) - 1
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fixed", [0.0, 0.2, 0.5, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("beside", [0.0, 0.08])
def test_fewer_turns_are_long_than_are_not(beside: float, fixed: float, seed: int) -> None:
    """By a clock that wavers, steps that take longer between readings, and any cost of a pass: for each turn that takes
    more than two undisturbed ones at least `SELDOM` are left out, so that they are fewer than half at any border."""
    noise, clock = np.random.default_rng(seed), TurnClock()
    budget, quiet, found = latency(clock), [], []
    for _ in range(20):
        quiet.append(noise.uniform(1.0, 1.1))
        clock.turn(budget, quiet[-1], linear(0.0))
    usual = statistics.median(quiet)
    clock.beside = beside
    for _ in range(400):
        began, cost = clock.now, linear(0.016 * noise.uniform(0.95, 1.15), fixed * noise.uniform(0.95, 1.15))
        clock.turn(budget, noise.uniform(1.0, 1.1) * 1.05, cost, "prefill")
        found.append(clock.now - began)
    late = sum(seconds > 2 * usual for seconds in found)
    assert late <= len(found) / (1 + SELDOM) + 1
    assert statistics.median(found) <= 2 * usual


def test_what_many_rows_take_is_no_measure_for_few() -> None:
    clock, cost = TurnClock(), linear(0.001)
    budget = latency(clock)
    for _ in range(3):
        clock.turn(budget, 0.1, cost, rows=32)
    for _ in range(60):
        clock.turn(budget, 0.1, cost, "prefill", rows=32)
    found = [clock.turn(budget, 0.03, cost, "prefill", rows=4).get("prefill", 0) for _ in range(40)]
    assert max(found) <= FIRST and 0 in found[: FIRST_LOOK + 1]


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


def test_turns_that_waited_for_no_step_are_no_measure() -> None:
    """Where a row leaves, the step in flight is read at the end of the turn, and the next one waits for none."""
    clock, step, cost = TurnClock(), 0.2, linear(0.002, fixed=0.2)
    budget = latency(clock)
    pattern = ((step, True), (step, True), (2 * step, False), (0.01 * step, False))
    for _ in range(8):
        for seconds, whole in pattern:
            clock.turn(budget, seconds, cost, whole=whole)
    read = [bool(clock.turn(budget, seconds, cost, "prefill", whole=whole)) for seconds, whole in 25 * pattern]
    # A reading takes `SELDOM` steps, beside one or two: at most so many turns are left out for it, and some to look.
    assert sum(read) >= len(read) / (1 + 1 + SELDOM) * LOOK_EVERY / (LOOK_EVERY + 1)


def left_out_after(reading: float, first: float, step: float) -> int:
    """Turns that are left out for one reading of so many seconds, where a turn was taken to be as long as the first one
    and is then known to take `step`."""
    clock, cost = TurnClock(), linear(0.1 * step, fixed=step)
    budget = TurnBudget(512, clock, prefer="latency", measure=lambda most: [(n, cost(n)) for n in (8, 64, 512)])
    budget.learn_costs()
    clock.turn(budget, first, cost)
    clock.turn(budget, step, linear(0.0, fixed=reading), "prefill")
    for _ in range(UNDISTURBED):
        clock.turn(budget, step, cost)
    return next(number for number in range(1000) if clock.turn(budget, step, cost, "prefill"))


def test_what_was_owed_by_a_wrong_measure_is_paid_in_turns_or_in_seconds() -> None:
    """It is over with whichever comes first."""
    assert left_out_after(reading=0.13, first=0.001, step=0.1) == 1, "a debt of 0.13 s is hundreds of a wrong turn"
    for reading, first in ((3.0, 1.0), (10.0, 3.0), (2.0, 0.5)):
        assert left_out_after(reading, first, step=0.02) <= MOST_OWED, "what turns of a second owe is few of them"


def sits(budget: TurnBudget, clock: TurnClock, step: float, beside: float = 0.0) -> bool:
    """A turn in which prompts that are there already only sit down, where it is their turn: prefix hits, siblings,
    prompts of one token. It takes `beside` steps more."""
    budget.begin(rows=8)
    budget.divide(["prefill"])
    if sat := budget.share("prefill") > 0:
        budget.measure("prefill", lambda: 0)
        clock.now += step * beside
    budget.steps(rows=8, joining=0)
    clock.now += step
    budget.end()
    return sat


@pytest.mark.parametrize("beside", [0.0, 0.2, 0.9])
def test_a_reading_without_tokens_owes_nothing(beside: float) -> None:
    """As long as the turn takes no more than two undisturbed ones."""
    clock, cost = TurnClock(), linear(0.001, fixed=0.05)
    budget = latency(clock)
    clock.turns(budget, 0.05, cost, "prefill")
    sat = sum(sits(budget, clock, 0.05, beside) for _ in range(90))
    assert sat >= 90 * LOOK_EVERY // (LOOK_EVERY + 1) - MOST_OWED


def test_a_reading_without_tokens_says_nothing_of_what_others_take_beside() -> None:
    clock, step, cost = TurnClock(beside=0.01), 0.05, linear(0.0005)
    budget = latency(clock)
    clock.turns(budget, step, cost, "prefill")
    most = max(tokens for tokens, _ in clock.turns(budget, step, cost, "prefill"))
    for _ in range(2 * LATEST):
        sits(budget, clock, step)
    assert max(tokens for tokens, _ in clock.turns(budget, step, cost, "prefill", count=3)) == most
