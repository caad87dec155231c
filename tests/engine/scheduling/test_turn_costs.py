"""What reading costs, as it is learnt: against lines whose two terms are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rollout_server.engine.scheduling.turn_costs import (
    BELIEVED,
    DEARER,
    RECENT,
    UNDISTURBED,
    ReadingCosts,
    UndisturbedTurns,
)
from tests.support.engine.turn_clock import Cost, linear

SIZES = (8, 33, 128, 512, 20, 300, 64, 512)


def learnt(cost: Cost, count: int = 24, costs: ReadingCosts | None = None) -> ReadingCosts:
    costs = costs or ReadingCosts()
    for tokens in itertools.islice(itertools.cycle(SIZES), count):
        costs.learn(tokens, cost(tokens))
    return costs


@pytest.mark.parametrize(("fixed", "per_token"), [(0.01, 0.001), (0.06, 5e-6), (0.0, 0.002), (0.03, 0.0)])
def test_both_terms_are_found(fixed: float, per_token: float) -> None:
    costs = learnt(linear(per_token, fixed))
    assert costs.fixed == pytest.approx(fixed, abs=1e-9) and costs.per_token == pytest.approx(per_token, abs=1e-9)


def test_the_line_is_that_of_least_squares() -> None:
    """Against numpy, where every size was read once; each point is weighted by what it costs."""
    points = [(8, 0.02), (40, 0.03), (130, 0.11), (500, 0.35)]
    costs = ReadingCosts()
    for tokens, seconds in points:
        costs.learn(tokens, seconds)
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    assert costs.per_token == pytest.approx(slope) and costs.fixed == pytest.approx(intercept)


def test_neither_term_is_negative() -> None:
    falling, steep = ReadingCosts(), ReadingCosts()
    for tokens, less, more in ((10, 0.03, 0.001), (100, 0.02, 0.02), (400, 0.01, 0.1)):
        falling.learn(tokens, less)
        steep.learn(tokens, more)
    assert falling.per_token == 0.0 < falling.fixed
    assert steep.fixed == 0.0 < steep.per_token


def test_noise_does_not_hide_them() -> None:
    noise = np.random.default_rng(0)
    costs = learnt(lambda tokens: (0.01 + 0.001 * tokens) * noise.uniform(0.9, 1.2), 48)
    assert costs.of(256) == pytest.approx(0.266 * 1.05, rel=0.1)
    assert costs.fixed == pytest.approx(0.0105, rel=0.5)


@pytest.mark.parametrize("tokens", [8, 512])
def test_a_shape_that_is_computed_for_the_first_time_says_nothing(tokens: int) -> None:
    costs = learnt(linear(0.001, 0.01))
    costs.learn(tokens, 10.0)
    assert costs.fixed == pytest.approx(0.01) and costs.per_token == pytest.approx(0.001)


def test_it_says_nothing_even_where_every_second_one_is_new() -> None:
    costs, cost = learnt(linear(5e-6, 0.01)), linear(5e-6, 0.01)
    for number in range(40):
        costs.learn(256 + number, cost(256 + number) + (2.0 if number % 2 else 0.0))
    assert costs.fixed == pytest.approx(0.01) and costs.per_token == pytest.approx(5e-6)


@pytest.mark.parametrize("times", [10.0, 0.1])
def test_costs_that_have_changed_are_believed(times: float) -> None:
    costs = learnt(linear(0.001, 0.01))
    learnt(linear(0.001 * times, 0.01 * times), RECENT + BELIEVED, costs)
    assert costs.fixed == pytest.approx(0.01 * times) and costs.per_token == pytest.approx(0.001 * times)


def test_dearer_ones_are_believed_after_a_few() -> None:
    costs = learnt(linear(0.001, 0.01))
    learnt(linear(0.01, 0.1), BELIEVED, costs)
    assert costs.of(256) >= 2.0


def test_where_all_have_one_size_both_terms_follow_alike() -> None:
    costs = ReadingCosts()
    costs.learn(100, 0.2)
    assert (costs.fixed, costs.per_token) == (0.0, 0.002)
    costs = learnt(linear(0.001, 0.1))
    for seconds in (0.2, 0.4):
        for _ in range(RECENT):
            costs.learn(100, seconds)
    assert costs.of(100) == pytest.approx(0.4) and costs.fixed == pytest.approx(0.2)


def test_full_chunks_that_vary_do_not_hide_what_a_pass_costs() -> None:
    """All of about one size, by a clock that wavers: the start has seen other sizes. Also where all becomes dearer."""
    noise, cost = np.random.default_rng(1), linear(0.001, 0.012)
    costs = ReadingCosts()
    costs.begin([(tokens, cost(tokens)) for tokens in (8, 128, 512)])
    for times in (1.0, 3.0):
        for tokens in noise.integers(200, 260, 3 * RECENT).tolist():
            costs.learn(tokens, times * cost(tokens) * noise.uniform(0.8, 1.2))
        assert costs.fixed == pytest.approx(0.012 * times, rel=0.3)
        assert costs.per_token == pytest.approx(0.001 * times, rel=0.15)


def test_what_fits_and_what_fills() -> None:
    costs = learnt(linear(0.001, 0.01))
    assert costs.within(0.11) == pytest.approx(100) and costs.within(0.005) == 0
    assert costs.filling(0.1) == pytest.approx(90) and costs.filling(0.5) == pytest.approx(10)
    assert learnt(linear(0.001)).filling(0.1) == pytest.approx(0.0, abs=1e-6)
    assert learnt(linear(0.0, 0.01)).filling(0.1) == learnt(linear(0.0, 0.01)).within(1.0) == float("inf")
    assert ReadingCosts().within(1.0) == float("inf") and not ReadingCosts().known


def test_undisturbed_turns_are_those_of_as_many_rows() -> None:
    turns = UndisturbedTurns()
    assert turns.of(8) is None
    for rows, seconds in ((8, 1.0), (8, 30.0), (8, 1.2), (64, 5.0)):
        turns.learn(rows, seconds, quiet=True)
    assert turns.of(8) == turns.of(7) == 1.2 and turns.of(64) == 5.0
    assert turns.of(32) == 1.2, "those of fewer rows, who take no longer"
    assert turns.of(4) is None, "more rows say nothing of fewer"


def test_quiet_turns_count_for_as_long_as_those_between_readings_agree() -> None:
    turns = UndisturbedTurns()
    turns.learn(8, 1.0, quiet=True)
    for between, found in ((1.05, 1.0), (0.9, 0.9), (1.05, 1.0)):
        turns.learn(8, between, quiet=False)
        assert turns.of(8) == found
    for _ in range(UNDISTURBED):
        turns.learn(8, 2.2, quiet=False)
    assert turns.of(8) == pytest.approx(2.2 / DEARER), "the rows have grown"
    for _ in range(UNDISTURBED):
        turns.learn(8, 3.0, quiet=True)
    assert turns.of(8) == 3.0, "what was between readings before is of no account"


def test_one_that_was_over_early_and_those_that_took_long_say_nothing() -> None:
    turns = UndisturbedTurns()
    for seconds in (1.0, 1.1, 1.0, 1.3, 9.0, 1.2, 0.1, 4.0, 1.0):
        turns.learn(8, seconds, quiet=True)
    assert turns.of(8) == 1.0
