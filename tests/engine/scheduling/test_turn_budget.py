"""What a turn may read, measured by a clock that the tests hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.kv_cache.sizes import padded, plan, planned
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.scheduling.turn_budget import FIRST, LEAST, Kind, TurnBudget
from tests.support.engine.door import wrap_forwards
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def turn(
        self, budget: TurnBudget, step: float, cost: Callable[[int], float], *wanting: Kind, rows: int = 8
    ) -> dict[Kind, int]:
        """One turn whose step takes so long, and reading n tokens cost(n); what each kind read."""
        budget.begin(decoding=True, rows=rows)
        budget.divide(wanting)
        read: dict[Kind, int] = {}
        for kind in wanting:
            if share := budget.share(kind):
                budget.measure(kind, lambda kind=kind, share=share: self._read(read, kind, share, cost))  # type: ignore[misc]
        self.now += step
        budget.end()
        return read

    def _read(self, read: dict[Kind, int], kind: Kind, share: int, cost: Callable[[int], float]) -> int:
        self.now += cost(share)
        read[kind] = share
        return share


def linear(seconds: float, fixed: float = 0.0) -> Callable[[int], float]:
    return lambda tokens: fixed + tokens * seconds


def turns_of(
    clock: Clock, budget: TurnBudget, step: float, cost: Callable[[int], float], *wanting: Kind, count: int = 80
) -> list[tuple[int, float]]:
    """Tokens read in each of so many turns, and how long it took."""
    found = []
    for _ in range(count):
        began = clock.now
        read = clock.turn(budget, step, cost, *wanting)
        found.append((sum(read.values()), clock.now - began))
    return found


@pytest.mark.parametrize(
    ("step", "cost", "least"),
    [
        (0.05, linear(0.0015), 28),
        # A GPU: the weights are read whatever the number of tokens.
        (0.008, linear(0.00002, fixed=0.004), 150),
        (0.05, linear(1e-6), 400),
    ],
)
def test_what_fits_is_read_in_every_turn(step: float, cost: Callable[[int], float], least: int) -> None:
    clock = Clock()
    budget = TurnBudget(512, clock)
    turns_of(clock, budget, step, cost, "prefill", count=60)
    found = turns_of(clock, budget, step, cost, "prefill")
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
def test_what_does_not_fit_is_read_seldom(step: float, cost: Callable[[int], float], bound: float) -> None:
    clock = Clock()
    budget = TurnBudget(512, clock)
    turns_of(clock, budget, step, cost, "prefill", count=400)
    found = turns_of(clock, budget, step, cost, "prefill")
    seconds = [seconds for _, seconds in found]
    assert statistics.median(seconds) <= 2 * step and statistics.mean(seconds) <= 2 * step
    assert max(seconds) <= bound * step
    # It gets on as fast as with the few tokens that would fit, or faster.
    fits = max((n for n in range(LEAST, 513) if cost(n) <= step), default=LEAST)
    assert sum(tokens for tokens, _ in found) / sum(seconds) >= 0.9 * fits / (step + cost(fits)) / 2


def test_the_measure_is_the_undisturbed_turn_not_the_one_beside_reading() -> None:
    """A turn that reads costs more than the step and the reading: the step in flight is waited for first."""
    clock = Clock()
    budget = TurnBudget(512, clock)
    found = turns_of(clock, budget, 0.05, linear(0.001, fixed=0.015), "prefill", count=160)[80:]
    assert all(seconds <= 0.101 for _, seconds in found)


def test_one_slow_turn_decides_nothing() -> None:
    clock, cost = Clock(), linear(0.001)
    budget = TurnBudget(512, clock)
    turns_of(clock, budget, 0.05, cost, "prefill")
    (stalled, _), *after = turns_of(clock, budget, 3.0, cost, "prefill", count=1) + turns_of(
        clock, budget, 0.05, cost, "prefill", count=20
    )
    read = [tokens for tokens, _ in after if tokens]
    assert min(read) >= 0.7 * stalled and read[-1] == pytest.approx(stalled, rel=0.1)
    assert [tokens for tokens, _ in after[:6]].count(0) <= 5


def test_a_slower_step_leaves_more_and_a_faster_one_less() -> None:
    clock, cost = Clock(), linear(0.001)
    budget = TurnBudget(512, clock)
    for step in (0.05, 0.1, 0.04):
        turns_of(clock, budget, step, cost, "prefill", count=150)
        read = [tokens for tokens, _ in turns_of(clock, budget, step, cost, "prefill", count=9) if tokens]
        assert read[-1] == pytest.approx(step * 950, rel=0.1)


def test_fewer_rows_have_an_undisturbed_turn_of_their_own() -> None:
    clock, cost = Clock(), linear(0.001)
    budget = TurnBudget(512, clock)
    for rows, step in ((32, 0.1), (4, 0.03)):
        for _ in range(3):
            clock.turn(budget, step, cost, rows=rows)
    for _ in range(60):
        clock.turn(budget, 0.1, cost, "prefill", rows=32)
    found = [clock.turn(budget, 0.03, cost, "prefill", rows=4).get("prefill", 0) for _ in range(40)]
    assert max(found[-8:]) <= 46 and sum(n == 0 for n in found[:12]) >= 3


def test_two_kinds_take_turns_while_rows_decode() -> None:
    clock, cost = Clock(), linear(0.001)
    budget = TurnBudget(512, clock)
    clock.turn(budget, 0.05, cost)
    served = [tuple(clock.turn(budget, 0.05, cost, "prefill", "scoring")) for _ in range(6)]
    assert served == [("prefill",), ("scoring",)] * 3
    # Whoever is alone reads every turn, but for those that show what is undisturbed.
    alone = [tuple(clock.turn(budget, 0.05, cost, "scoring")) for _ in range(9)]
    assert set(alone) == {("scoring",), ()} and alone.count(()) <= 2


def test_everything_may_be_read_when_nothing_decodes() -> None:
    budget = TurnBudget(512, Clock())
    budget.begin(decoding=False)
    budget.divide(["prefill"])
    assert (budget.share("prefill"), budget.share("scoring")) == (512, 0)
    budget.divide(["prefill", "scoring"])
    assert (budget.share("prefill"), budget.share("scoring")) == (256, 256)


def test_a_small_budget_is_the_most_there_is() -> None:
    clock = Clock()
    budget = TurnBudget(5, clock)
    for cost in (linear(1e-6), linear(1.0)):
        assert {tokens for tokens, _ in turns_of(clock, budget, 0.05, cost, "prefill")} == {0, 5}


def test_sizes_are_those_that_were_planned() -> None:
    assert [padded(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 100, 400)] == [
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        12,
        12,
        16,
        128,
        512,
    ]
    for n in range(1, 2000):
        assert padded(n) >= n >= planned(n) == padded(planned(n)) and padded(n) <= 1.5 * n


def test_chunks_are_padded_little() -> None:
    assert plan([], 64) == [] and plan([0, 0], 64) == []
    assert plan([0, 500, 100], 64) == [(1, 64)]
    assert plan([10, 10, 10, 10], 64) == [(index, 10) for index in range(4)]
    assert plan([2, 500], 512) == [(0, 2), (1, 256)]
    for lefts in ([3, 90, 40, 41, 7], [500, 1, 1, 1], [1, 1, 1, 500], [64] * 9, list(range(1, 40))):
        for budget in (1, 8, 33, 64, 512):
            chunks = plan(lefts, budget)
            longest = max(count for _, count in chunks)
            assert chunks[0][0] == 0 and len(chunks) * longest <= budget
            assert all(0 < count <= lefts[index] for index, count in chunks)
            assert all(2 * count >= longest for index, count in chunks[1:]), "only the first may be short"


# ---- in the engine ------------------------------------------------------------------------------------------------


def test_rows_decode_while_a_long_prompt_is_read(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), prefill_tokens=512)
    short, long = prompts_of([20, 600], 286)
    first = driver.submit([short], n=4, max_tokens=60, ignore_eos=True)
    driver.turn(4)
    second = driver.submit([long], max_tokens=4, ignore_eos=True)
    batch: Any = driver.batches
    progress = []
    while not driver.over(second):
        fed, steps = batch.prefilled, driver.status.steps
        driver.turn()
        progress.append((batch.prefilled - fed, driver.status.steps - steps))
    assert max(fed for fed, _ in progress) == FIRST and all(steps for _, steps in progress[:-3])
    driver.finish(first)


def test_prompts_and_scores_share_a_turn(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), prefill_tokens=64)
    short, long, given = prompts_of([20, 500, 500], 286)
    first = driver.submit([short], n=4, max_tokens=80, ignore_eos=True)
    driver.turn(4)
    second = driver.submit([long], max_tokens=4, ignore_eos=True)
    scored = driver.ask_score([given])
    reader: Any = driver.reader
    batch: Any = driver.batches
    driver.turn()
    kinds = []
    for _ in range(12):
        fed, left = batch.prefilled, reader.left
        driver.turn()
        kinds.append((batch.prefilled - fed, left - reader.left))
    assert all(sorted(kind)[0] <= 0 < sorted(kind)[1] <= FIRST for kind in kinds[2:]), kinds
    assert sum(fed > 0 for fed, _ in kinds) in (5, 6, 7)
    driver.finish(first, second)
    assert driver.scored(scored)


@pytest.mark.parametrize("huge_first", [True, False])
def test_nobody_starves(huge_first: bool, bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=8)
    (huge,), small = prompts_of([200], 286), prompts_of([10] * 6, 286, seed=1)
    started: list[str] = []

    def ask_huge() -> None:
        started.append(driver.submit([huge], n=40, max_tokens=10, ignore_eos=True))

    if huge_first:
        ask_huge()
    started += [driver.submit([prompt], n=2, max_tokens=10, ignore_eos=True) for prompt in small]
    if not huge_first:
        ask_huge()
    driver.finish(*started, turns=400)
    ends = [at for at, event in enumerate(driver.events) if type(event).__name__ == "RequestDone"]
    order = [driver.events[at].id for at in ends]  # type: ignore[union-attr]
    # First come, first served, but for those that run together.
    assert sorted(order) == sorted(started) and abs(order.index(started[0])) <= 4
    assert all(len(row.token_ids) == 10 for id in started for row in driver.rollouts(id))


def test_chunks_of_few_shapes_change_nothing(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    """As on devices where each shape is planned at its first use."""
    from dataclasses import replace

    from rollout_server.engine.kv_cache.padded import PaddedKV
    from rollout_server.engine.kv_cache.store import Forward

    model = bare_model("qwen3")
    windows: list[int | None] = [None] * len(model.module.layers)
    coarse = replace(model, make_store=lambda: PaddedKV(windows, 16, coarse=True))
    driver = Driver.start(qwen, coarse, max_batch=16, prefill_tokens=200)
    prompts = prompts_of([3, 50, 21, 77, 9, 130, 64], 286)
    shapes: list[tuple[int, ...]] = []

    def noting(forward: Forward) -> Forward:
        def noted(tokens: mx.array, caches: list[Any]) -> mx.array:
            shapes.append(tuple(tokens.shape))
            return forward(tokens, caches)

        return noted

    wrap_forwards(driver.batch(0), noting)
    found = driver.generate(prompts, n=2, max_tokens=8)
    expected = Driver.start(qwen, model, max_batch=16, prefill_tokens=200).generate(prompts, n=2, max_tokens=8)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert_near(one.logprobs, other.logprobs, TINY.of_row(other))
    read = [shape for shape in shapes if shape[1] > 1]
    assert read and all(padded(rows) == rows and padded(length) == length for rows, length in read)
    scored, plain = driver.score(prompts), Driver.start(qwen, model).score(prompts)
    for one, other in zip(scored, plain, strict=True):
        assert_near(one.logprobs[1:], other.logprobs[1:], TINY.of_logprobs(other.logprobs[1:], 130))
