"""How the two rules share a turn, and what an engine makes of that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.kv_cache.sizes import padded, plan, planned
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.scheduling.latency import FIRST
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scheduling.turn_costs import UndisturbedTurns
from rollout_server.rollout import Wants
from tests.support.engine.door import wrap_forwards
from tests.support.engine.driver import Driver, prompts_of
from tests.support.engine.turn_clock import TurnClock, linear
from tests.support.numbers.bounds import TINY, assert_near


def test_everything_may_be_read_when_nothing_decodes() -> None:
    budget = TurnBudget(512, TurnClock())
    budget.begin(rows=0)
    budget.divide(["prefill"])
    assert (budget.share("prefill"), budget.share("scoring")) == (512, 0)
    budget.divide(["prefill", "scoring"])
    assert (budget.share("prefill"), budget.share("scoring")) == (256, 256)


def test_a_turn_in_which_no_row_steps_is_no_undisturbed_one() -> None:
    """As where all rows are aborted: it is over at once, and would be taken for what they take."""
    clock, cost = TurnClock(), linear(0.001)
    budget = TurnBudget(512, clock, prefer="latency")
    clock.turns(budget, 0.05, cost, "prefill")
    usual = max(tokens for tokens, _ in clock.turns(budget, 0.05, cost, "prefill"))
    for _ in range(9):
        budget.begin(rows=8)
        budget.end()
    assert max(tokens for tokens, _ in clock.turns(budget, 0.05, cost, "prefill", count=9)) == usual


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


@pytest.mark.parametrize(
    ("options", "wants", "kept_going"),
    [
        ({"prefer": "latency"}, Wants(), True),
        ({}, Wants(tokens_as_they_come=True), True),
        ({}, Wants(), False),
    ],
    ids=["latency", "a stream", "throughput"],
)
def test_rows_decode_while_a_long_prompt_is_read(
    options: dict[str, Any], wants: Wants, kept_going: bool, bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    """Where somebody reads them as they come; otherwise they wait for the rows that are to join them."""
    driver = Driver.start(qwen, bare_model("qwen3"), prefill_tokens=512, **options)
    short, long = prompts_of([20, 600], 286)
    first = driver.submit([short], n=4, max_tokens=36, ignore_eos=True, wants=wants)
    driver.turn(4)
    second = driver.submit([long], max_tokens=4, ignore_eos=True)
    batch: Any = driver.batches
    progress = []
    while not driver.over(second):
        fed, steps = batch.prefilled, driver.status.steps
        driver.turn()
        progress.append((batch.prefilled - fed, driver.status.steps - steps))
    if kept_going:
        assert max(fed for fed, _ in progress) == FIRST and all(steps for _, steps in progress[:-3])
    else:
        # The second chunk is the last one, and the row steps with the others in its turn.
        assert progress[:2] == [(512, 0), (87, 1)]
    driver.finish(first)
    alone = Driver.start(qwen, bare_model("qwen3")).generate([short], n=4, max_tokens=36, ignore_eos=True)
    assert [row.token_ids for row in driver.rollouts(first)] == [row.token_ids for row in alone]


@pytest.mark.parametrize("family", ["qwen3", "mamba2"])
def test_a_turn_says_what_a_step_takes_where_one_was_in_flight_before_and_after(
    family: str,
    bare_model: Callable[[str], ResidentModel],
    model_path: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that leave, and places that move, have the step in flight read before the turn is over."""
    driver = Driver.start(model_path(family), bare_model(family), max_batch=8, prefer="latency")
    before: list[bool] = []
    learnt: list[tuple[bool, bool]] = []
    begin, learn = TurnBudget.begin, UndisturbedTurns.learn

    def begun(budget: TurnBudget, **asked: Any) -> None:
        before.append(driver.batches.flying)
        begin(budget, **asked)

    def noted(turns: UndisturbedTurns, rows: int, seconds: float, *, quiet: bool) -> None:
        learnt.append((before[-1], driver.batches.flying))
        learn(turns, rows, seconds, quiet=quiet)

    monkeypatch.setattr(TurnBudget, "begin", begun)
    monkeypatch.setattr(UndisturbedTurns, "learn", noted)
    ids = [
        driver.submit([prompt], max_tokens=6 * at, ignore_eos=True)
        for at, prompt in enumerate(prompts_of([9] * 6, 286), 1)
    ]
    driver.finish(*ids)
    assert set(learnt) == {(True, True)}
    assert before.count(False) > 1, "some turns began without a step in flight, besides the first"


def test_rows_fly_while_every_batch_that_seats_some_has_a_step_in_flight(
    bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=8)
    assert not driver.batches.flying, "nobody sits"
    id = driver.submit(prompts_of([9], 286), n=2, max_tokens=9, ignore_eos=True)
    driver.turn(3)
    assert driver.batches.flying
    driver.batches.settle()
    assert driver.batches.rows and not driver.batches.flying
    driver.finish(id)
    assert not driver.batches.flying


def test_streams_count_for_as_long_as_their_rows_run(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=2)
    wants, (one, other) = Wants(tokens_as_they_come=True), prompts_of([20, 30], 286)
    ids = [driver.submit([one], max_tokens=8, ignore_eos=True, wants=wants) for _ in range(3)]
    plain = driver.submit([other], n=2, max_tokens=8, ignore_eos=True)
    driver.abort(driver.submit([other], max_tokens=8, wants=wants))
    # What begins alike is read once: the second row joins a turn later.
    driver.turn(2)
    assert driver.requests.streams == 3 and sum(row.streamed for row in driver.batches.rows) == 2
    driver.finish(*ids)
    assert driver.requests.streams == 0 and not any(row.streamed for row in driver.batches.rows)
    driver.finish(plain)


def test_prompts_and_scores_share_a_turn(bare_model: Callable[[str], ResidentModel], qwen: Path) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), prefill_tokens=64, prefer="latency")
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
