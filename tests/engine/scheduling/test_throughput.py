"""All rows are done soonest: whole jobs by a clock that the tests hold, against the sum of their parts."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest

from rollout_server.engine.scheduling.throughput import FIXED_SHARE, STEP_EVERY
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scheduling.turn_costs import Kind
from tests.support.engine.turn_clock import Cost, Jobs, TurnClock, linear

CPU = (linear(0.0008, fixed=0.01), linear(0.001, fixed=0.012))
"""What a step of so many rows takes, and what reading so many tokens does."""
GPU = (linear(0.00001, fixed=0.012), linear(0.000005, fixed=0.02))
SLOW = (linear(0.00001, fixed=0.012), linear(0.000005, fixed=0.07))
"""Its forwards that read are bound by the host."""
DEVICES = pytest.mark.parametrize(
    ("device", "most"), [(CPU, 512), (GPU, 8192), (SLOW, 8192)], ids=["cpu", "gpu", "slow"]
)


def jobs(
    device: tuple[Cost, Cost], places: int, waiting: list[tuple[int, int, int]], most: int = 8192, **options: Any
) -> Jobs:
    step, cost = device
    clock = TurnClock()
    budget = TurnBudget(most, clock, measure=lambda most: [(n, cost(n)) for n in (8, 128, most)])
    budget.learn_costs()
    return Jobs(budget, clock, places, step, cost, waiting, **options)


def parts(device: tuple[Cost, Cost], places: int, groups: list[tuple[int, int, int]], most: int) -> float:
    """Seconds of reading all prompts in the largest chunks, and of decoding all tokens in full batches."""
    step, cost = device
    prompts, tokens = sum(prompt for prompt, _, _ in groups), sum(rows * length for _, rows, length in groups)
    return prompts / most * cost(most) + tokens / places * step(places)


@DEVICES
@pytest.mark.parametrize("places", [64, 256])
def test_a_job_takes_little_more_than_its_parts(device: tuple[Cost, Cost], most: int, places: int) -> None:
    groups = [(256, 8, 128)] * 32
    job = jobs(device, places, list(groups), most)
    assert job.run() <= 1.1 * parts(device, places, groups, most)


@DEVICES
def test_rows_that_end_one_by_one_are_followed_by_others(device: tuple[Cost, Cost], most: int) -> None:
    """Prompts of their own, rows of any length; the tail, in which nobody is left to follow, is the job's own."""
    lengths = np.random.default_rng(1).geometric(1 / 100, 800).tolist()
    groups = [(256, 1, length) for length in lengths]
    job = jobs(device, 64, list(groups), most)
    while job.waiting:
        job.turn()
    left = [(0, 1, tokens) for tokens in job.rows]
    full = parts(device, 64, groups, most) - parts(device, 64, left, most)
    # Where so many rows end in a step, no period of reading loses less than this to passes and to idle places.
    step, cost, ended = device[0](64), device[1](0), 64 / statistics.mean(lengths)
    saw = sum(lengths) / 64 * math.sqrt(2 * cost * step * ended / 64)
    assert job.clock.now <= 1.1 * (full + saw)


@DEVICES
def test_rows_that_are_ready_wait_for_those_that_are_read(device: tuple[Cost, Cost], most: int) -> None:
    """Requests that come one after another while the first rows run already."""
    job = jobs(device, 256, [(256, 8, 128)], most)
    for _ in range(3):
        job.turn()
    job.waiting += [(256, 8, 128)] * 31
    before, turns = job.steps, 0
    while job.waiting or job.joining:
        job.turn()
        turns += 1
    step, cost = device
    # Until a pass is worth while, now and then while many chunks are read, and when all are.
    alone = 2 + cost(0) / step(8) + turns / STEP_EVERY
    assert job.steps - before <= alone + 1
    assert len(job.rows) == 256


def test_chunks_are_those_of_which_a_pass_is_a_small_part() -> None:
    for device, most, least, largest in ((CPU, 2048, 150, 300), (GPU, 8192, 8192, 8192), (SLOW, 8192, 8192, 8192)):
        budget = jobs(device, 8, [], most).budget
        budget.begin(rows=0)
        budget.divide(["prefill"])
        assert least <= budget.share("prefill") <= largest


def test_a_huge_prompt_stops_neither_rows_nor_itself() -> None:
    job = jobs(CPU, 64, [(64, 63, 5000)], 512)
    while len(job.rows) < 63:
        job.turn()
    job.turn()
    job.waiting.append((30_000, 1, 10))
    step, began, before = CPU[0](63), job.clock.now, job.steps
    job.longest = 0.0
    while job.waiting or job.joining:
        job.turn()
    seconds = job.clock.now - began
    reading = 30_000 * 0.001 * 1.1
    assert seconds <= 2.2 * reading, "it has half the time"
    assert (job.steps - before) * step >= 0.4 * seconds, "and rows the other half"
    assert job.longest <= CPU[1](512) + 2 * step


def test_many_huge_prompts_leave_rows_a_step_now_and_then() -> None:
    job = jobs(CPU, 64, [(64, 8, 5000)], 512)
    for _ in range(4):
        job.turn()
    job.waiting += [(30_000, 8, 10)] * 7
    job.longest = 0.0
    for _ in range(200):
        job.turn()
    assert job.steps >= 200 // STEP_EVERY - 2 and job.longest <= STEP_EVERY * CPU[1](512) + CPU[0](8)


@DEVICES
def test_one_row_that_comes_late_is_not_kept_waiting(device: tuple[Cost, Cost], most: int) -> None:
    """Beside one row its place would be half of the batch, beside 250 a small part."""
    step, cost = device
    for running, longest in ((1, 2 * cost(0) + 2 * step(1)), (250, cost(0) / FIXED_SHARE + step(250))):
        job = jobs(device, 256, [(64, running, 5000)], most)
        for _ in range(5):
            job.turn()
        job.waiting.append((30, 1, 10))
        came = job.clock.now
        while job.waiting:
            job.turn()
        job.turn()
        assert len(job.rows) == running + 1 and job.clock.now - came <= longest + cost(30) + 2 * step(running + 1)


def test_tiny_prompts_are_not_read_one_by_one() -> None:
    """Rows of one token each: reading never ends, and no row waits long for its step."""
    job = jobs(GPU, 64, [(4, 1, 3)] * 2000, 8192)
    seconds = job.run()
    assert seconds <= 2000 / 64 * (3 * GPU[0](64) + GPU[1](4 * 64)) * 1.3


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_scoring_and_rows_have_as_much_time(device: tuple[Cost, Cost]) -> None:
    job = jobs(device, 64, [(64, 64, 100_000)], 512)
    for _ in range(4):
        job.turn()
    job.scoring = 10**9
    began, before = job.clock.now, job.steps
    for _ in range(400):
        job.turn()
    share = (job.steps - before) * device[0](64) / (job.clock.now - began)
    assert 0.4 <= share <= 0.7
    read = 10**9 - job.scoring
    assert read * device[1](512) / 512 >= 0.25 * (job.clock.now - began)


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_rows_come_before_the_rewards_of_others(device: tuple[Cost, Cost]) -> None:
    """They keep 0.85 of their rate, and rewards get what that leaves, whatever is read beside."""
    job = jobs(device, 64, [(64, 64, 100_000)], 512, reads="rewards")
    for _ in range(4):
        job.turn()
    job.scoring = 10**9
    began, before = job.clock.now, job.steps
    while job.clock.now - began < 400 * device[1](512):
        job.turn()
    passed = job.clock.now - began
    assert (job.steps - before) * device[0](64) >= 0.85 * passed
    assert (10**9 - job.scoring) * device[1](512) / 512 >= 0.1 * passed
    # What is waited for gets its time all the same.
    job.reads, unread, asked = "scoring", job.scoring, job.clock.now
    while job.clock.now - asked < 100 * device[1](512):
        job.turn()
    assert (unread - job.scoring) * device[1](512) / 512 >= 0.25 * (job.clock.now - asked)


def test_rewards_are_read_at_full_speed_once_all_rows_have_ended() -> None:
    job = jobs(CPU, 64, [(64, 64, 20)], 512, scoring=20_000, reads="rewards")
    assert job.run() <= 1.1 * (parts(CPU, 64, [(64, 64, 20)], 512) + 20_000 / 512 * CPU[1](512))


@pytest.mark.parametrize("reads", ["scoring", "rewards"])
def test_prompts_rows_and_scoring_all_get_on(reads: Kind) -> None:
    job = jobs(CPU, 64, [(200, 8, 100)] * 40, 512, scoring=20_000, reads=reads)
    seconds = job.run()
    assert seconds <= 1.2 * (parts(CPU, 64, [(200, 8, 100)] * 40, 512) + 20_000 / 512 * CPU[1](512))


def test_a_stall_of_ten_seconds_changes_nothing() -> None:
    job = jobs(GPU, 64, [(256, 1, 64)] * 600, 8192)
    for _ in range(30):
        job.turn()
    cost, stalls = job.cost, iter([10.0])
    job.cost = lambda tokens: cost(tokens) + next(stalls, 0.0)
    groups = [*job.waiting, *[(0, 1, left) for left in job.rows], *[(each.left, 1, 64) for each in job.joining]]
    assert job.run() <= 10.0 + 1.25 * parts(GPU, 64, groups, 8192) + 64 * GPU[0](64)


@pytest.mark.parametrize("times", [10.0, 0.1])
def test_costs_that_change_are_followed(times: float) -> None:
    job = jobs(CPU, 64, [(200, 1, 64)] * 300, 512)
    for _ in range(60):
        job.turn()
    changed = tuple(lambda n, each=each: times * each(n) for each in CPU)  # type: ignore[misc]
    job.step, job.cost = changed
    groups = [*job.waiting, *[(0, 1, left) for left in job.rows], *[(each.left, 1, 64) for each in job.joining]]
    step, cost = CPU
    device = (lambda rows: times * step(rows), lambda tokens: times * cost(tokens))
    assert job.run() <= 1.2 * parts(device, 64, groups, 512) + 64 * device[0](64)


def test_while_nothing_is_known_the_most_is_read() -> None:
    budget = TurnBudget(512, TurnClock())
    budget.begin(rows=0)
    budget.divide(["prefill"])
    assert budget.share("prefill") == 512 and budget.admits()


def test_streams_are_kept_going_and_the_rest_is_not() -> None:
    """The same rows beside the same prompts, with and without somebody who reads a row as it comes."""
    gaps = {}
    for streamed in (True, False):
        job = jobs(CPU, 64, [(64, 16, 5000)], 512, streamed=streamed)
        for _ in range(20):
            job.turn()
        job.waiting += [(3000, 1, 1)] * 30
        found = []
        while job.waiting or job.joining:
            steps, began = job.steps, job.clock.now
            while job.steps == steps:
                job.turn()
            found.append(job.clock.now - began)
        gaps[streamed] = statistics.median(found) / CPU[0](16)
    assert gaps[True] <= 2.0 < gaps[False]
