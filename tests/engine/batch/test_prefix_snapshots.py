"""States kept for later requests, in models whose state cannot be cut: they change nothing but how much is read."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.messages.versions import Delete
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.rollout import Rollout
from tests.engine.batch.test_batch import tolerance
from tests.engine.batch.test_prefix_reuse import assert_all_same, pair
from tests.laws.grids import some_long
from tests.support.engine.door import broken_steps, wrap_forwards
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

Models = Callable[[str], ResidentModel]
Paths = Callable[[str], Path]
KINDS = ["mamba2", "granitemoehybrid", "falcon_h1", "xlstm"]
"""States alone, beside keys and values, both in one layer, and of this project."""
END = 286
"""The id that ends a message of the tiny models, one above what `prompts_of` draws from."""


@pytest.mark.parametrize("family", some_long([*KINDS, "gemma2"], KINDS[1]))
def test_turns_of_a_conversation(family: str, bare_model: Models, model_path: Paths) -> None:
    model = bare_model(family)
    on, off = pair(model_path(family), model, prefill_tokens=48)
    (prompt,) = prompts_of([70], END)
    for turn in range(3):
        options: dict[str, Any] = {"n": 3, "seed": turn, "max_tokens": 8, "ignore_eos": True}
        found, expected = on.generate([prompt], **options), off.generate([prompt], **options)
        assert_all_same(found, expected, tolerance(off, expected))
        before = len(prompt) - 7 - 1
        assert [row.cached_tokens for row in found] == [0 if turn == 0 else before] * 3
        prompt = [*prompt, *found[1].token_ids, *prompts_of([7], END, seed=turn)[0]]
    status = on.status.prefix
    assert status.on and (status.hits, status.misses) == (2, 1) and status.nbytes > 0
    assert off.status.prefix.on is False and off.status.prefix.nbytes == 0


@pytest.mark.parametrize("family", some_long(["mamba2", "qwen3_next"], "mamba2"))
def test_the_second_turn_of_a_long_conversation_reads_what_is_new(
    family: str, bare_model: Models, model_path: Paths
) -> None:
    """Of 2,000 tokens; its numbers are those of a fresh pass."""
    driver = Driver.start(model_path(family), bare_model(family))
    (prompt,) = prompts_of([1880], END)
    (first,) = driver.generate([prompt], max_tokens=60, ignore_eos=True)
    read = driver.batches.prefilled
    again = [*prompt, *first.token_ids, *prompts_of([60], END, seed=5)[0]]
    (second,) = driver.generate([again], max_tokens=8, ignore_eos=True)
    assert len(again) == 2000 and read == 1879
    assert driver.batches.prefilled - read <= 0.15 * read
    logits = driver.model.forward(mx.array([again + list(second.token_ids[:-1])]), driver.model.make_caches())
    fresh = logits[0, len(again) - 1 :].astype(mx.float32)
    fresh = fresh - mx.logsumexp(fresh, axis=-1, keepdims=True)
    sampled = fresh[mx.arange(8), mx.array(second.token_ids)]
    assert_near(second.logprobs, sampled, 1e-4)


def test_conversations_share_the_first_message(bare_model: Models, model_path: Paths) -> None:
    driver = Driver.start(model_path("mamba2"), bare_model("mamba2"))
    system = [*prompts_of([150], END)[0], END]
    asked = [[*system, *tail] for tail in prompts_of([20, 30, 25], END, seed=1)]
    driver.generate(asked[:1])
    rows = driver.generate(asked[1:])
    assert [row.cached_tokens for row in rows] == [151, 151]
    expected = Driver.start(model_path("mamba2"), driver.model, prefix_cache=False).generate(asked[1:])
    assert_all_same(rows, expected, tolerance(driver, rows))


def test_prompts_that_part_anywhere_leave_a_state_there(bare_model: Models, model_path: Paths) -> None:
    """The second one finds out where, the third one finds the state."""
    driver = Driver.start(model_path("falcon_h1"), bare_model("falcon_h1"))
    shots = prompts_of([150], END)[0]
    asked = [[*shots, first, *tail] for first, tail in enumerate(prompts_of([20, 30, 25], END, seed=1))]
    assert [driver.generate([prompt])[0].cached_tokens for prompt in asked] == [0, 0, 150]


def test_prompts_of_one_moment_read_what_they_share_once(bare_model: Models, model_path: Paths) -> None:
    driver = Driver.start(model_path("mamba2"), bare_model("mamba2"), prefill_tokens=64)
    shots = prompts_of([150], END)[0]
    asked = [[*shots, *tail] for tail in prompts_of([20, 30, 25], END, seed=1)]
    rows = driver.generate(asked)
    assert driver.batches.prefilled == 150 + 19 + 29 + 24
    same = driver.generate([prompts_of([50], END, seed=3)[0]] * 6, seed=4)
    assert sorted(row.cached_tokens for row in same) == [0] + [49] * 5
    off = Driver.start(model_path("mamba2"), driver.model, prefix_cache=False)
    expected = off.generate(asked)
    assert_all_same(rows, expected, tolerance(driver, rows))


def test_samples_that_start_later_share_the_prompt_of_their_group(bare_model: Models, model_path: Paths) -> None:
    driver = Driver.start(model_path("mamba2"), bare_model("mamba2"), max_batch=2)
    (prompt,) = prompts_of([90], END)
    rows = driver.generate([prompt], n=7, seed=3, max_tokens=6, ignore_eos=True)
    assert driver.batches.prefilled == 89
    off = Driver.start(model_path("mamba2"), driver.model, prefix_cache=False)
    assert_all_same(rows, off.generate([prompt], n=7, seed=3, max_tokens=6, ignore_eos=True), tolerance(off, rows))


def rows_of_uneven_ends(driver: Driver) -> list[Rollout]:
    """Some end by length and some by a stop, while others go on."""
    ids = [
        driver.submit([prompt], seed=at, max_tokens=4 + 3 * at, stop_token_ids=tuple(range(at * 20, at * 20 + 60)))
        for at, prompt in enumerate(prompts_of([30, 12, 44, 25, 9, 38], END))
    ]
    driver.finish(*ids)
    return [driver.rollouts(id)[0] for id in ids]


@pytest.mark.parametrize("family", some_long([*KINDS, "gemma2"], *KINDS[:2]))
def test_rows_that_end_beside_others_leave_the_state_they_have(
    family: str, bare_model: Models, model_path: Paths
) -> None:
    """A step for the others may have read the token that a row sampled last."""
    on, off = pair(model_path(family), bare_model(family))
    rows = rows_of_uneven_ends(on)
    assert len({row.finish_reason for row in rows}) == 2
    longer = [[*row.prompt_ids, *row.token_ids, 7, 8, 9] for row in rows]
    found = on.generate(longer, max_tokens=6, ignore_eos=True)
    assert {len(prompt) - 3 - row.cached_tokens for prompt, row in zip(longer, found, strict=True)} <= {0, 1}
    expected = off.generate(longer, max_tokens=6, ignore_eos=True)
    assert_all_same(found, expected, tolerance(off, expected))


def test_versions_never_share(model_path: Paths) -> None:
    driver = Driver.start(model_path("mamba2"))
    (prompt,) = prompts_of([40], END)
    one, two = driver.bundle(1), driver.bundle(2, dora=True)
    driver.push("p", one)
    driver.push("q", two)
    for policy in ("base", "p", "q"):
        assert driver.generate([prompt], policy=policy, max_tokens=2)[0].cached_tokens == 0
    driver.push("r", one)
    assert driver.generate([prompt], policy="r", max_tokens=2)[0].cached_tokens == 39
    driver.push("p", two, mode="merged")
    merged = driver.generate([prompt], policy="p", seed=5)[0]
    assert merged.cached_tokens == 0
    alone = Driver.start(model_path("mamba2"), prefix_cache=False)
    alone.push("p", alone.bundle(2, dora=True), mode="merged")
    (expected,) = alone.generate([prompt], policy="p", seed=5)
    assert_all_same([merged], [expected], tolerance(alone, [expected]))


def test_a_swap_in_mid_row_leaves_no_state(model_path: Paths) -> None:
    """Neither a row that switched nor one that outlives its version is found again, of adapters and parameter sets."""
    driver = Driver.start(model_path("mamba2"))
    (prompt,) = prompts_of([40], END)
    for mode in ("adapter", "merged"):
        driver.push("p", driver.bundle(1))
        id = driver.submit([prompt], policy="p", on_update="switch", max_tokens=30, ignore_eos=True)
        driver.turn(8)
        driver.push("p", driver.bundle(2), mode=mode)
        driver.finish(id)
        (row,) = driver.rollouts(id)
        assert len(row.spans) == 2
        longer = [*prompt, *row.token_ids]
        old, new = row.spans[0].version.number, row.spans[1].version.number
        for number, expected in ((old, 39), (new, 0)):
            assert driver.generate([longer], policy=f"p@{number}", max_tokens=2)[0].cached_tokens == expected
        outliving = driver.submit([prompt], policy="p", max_tokens=30, ignore_eos=True)
        driver.turn(6)
        driver.change(Delete("", "p"))
        driver.finish(outliving)
        driver.turn(3)
        assert driver.status.prefix.nbytes == 0


def test_what_failed_is_forgotten(model_path: Paths) -> None:
    driver = Driver.start(model_path("mamba2"))
    (prompt,) = prompts_of([40], END)
    id = driver.submit([prompt], max_tokens=30, ignore_eos=True)
    driver.turn(3)
    assert driver.status.prefix.nbytes > 0
    undo = wrap_forwards(driver.batch(0), lambda forward: lambda tokens, caches: forward(tokens, caches) * mx.nan)
    driver.finish(id)
    undo()
    driver.turn(3)
    assert driver.rollouts(id)[0].error is not None and driver.status.prefix.nbytes == 0
    driver.generate([prompt])
    with broken_steps(driver.batch(0)):
        driver.finish(driver.submit([prompt]))
    assert driver.status.prefix.nbytes == 0


@pytest.mark.parametrize("family", some_long(["mamba2", "falcon_h1"], "mamba2"))
def test_states_give_way_before_rows_do(family: str, bare_model: Models, model_path: Paths) -> None:
    """States of rows that are over go first; then the newest rows step aside, and come back with the same tokens."""
    model = bare_model(family)
    free = Driver.start(model_path(family), model, prefix_cache=False)
    prompts = prompts_of([20] * 5, END)
    expected = free.generate(prompts, seed=1, max_tokens=120, ignore_eos=True)
    small = replace(model, info=replace(model.info, kv_memory=3 * model.info.row_bytes(110)))
    driver = Driver.start(model_path(family), small)
    driver.generate(prompts_of([30, 40], END, seed=5), max_tokens=4)
    assert driver.status.prefix.nbytes > 0
    id = driver.submit(prompts, seed=1, max_tokens=120, ignore_eos=True)
    most = 0
    while not driver.over(id):
        driver.turn()
        most = max(most, driver.batches.nbytes + driver.status.prefix.nbytes)
    assert driver.status.prefix.evictions > 0 and most <= small.info.kv_memory
    assert driver.preemptions > 0
    rows = driver.rollouts(id)
    assert_all_same(rows, expected, max(TINY.of_row(row) for row in expected))


@pytest.mark.parametrize(("seed", "family"), some_long(list(product(range(2), KINDS)), (0, KINDS[0])))
def test_random_beginnings_under_pressure(seed: int, family: str, bare_model: Models, model_path: Paths) -> None:
    """Prompts that share what chance gives them, rows that end anywhere or are preempted, aborts, little memory."""
    model = bare_model(family)
    chance = random.Random(seed)
    memory = chance.choice([3, 8, 60]) * model.info.row_bytes(120)
    small = replace(model, info=replace(model.info, kv_memory=memory))
    on, off = pair(model_path(family), small, max_batch=6, prefill_tokens=chance.choice([16, 64, 512]))
    seen = prompts_of([chance.randrange(1, 90) for _ in range(5)], END, seed=seed)
    for _ in range(4):
        prompts = []
        for _ in range(chance.randrange(1, 5)):
            stem = chance.choice(seen)
            tail = [chance.randrange(END + 1) for _ in range(chance.randrange(12))]
            prompts.append([*stem[: chance.randrange(1, len(stem) + 1)], *tail][:100])
        options: dict[str, Any] = {"n": chance.randrange(1, 4), "max_tokens": chance.randrange(1, 20)}
        options |= {"seed": chance.randrange(100), "top_p": 0.9, "stop_token_ids": tuple(range(chance.randrange(40)))}
        abort = chance.random() < 0.3
        results = []
        for driver in (on, off):
            id = driver.submit(prompts, **options)
            if abort:
                driver.turn(6)
                driver.abort(id)
            while not driver.over(id):
                driver.turn()
                assert driver.batches.nbytes + driver.status.prefix.nbytes <= memory
            results.append(driver.rollouts(id))
        for one, other in zip(*results, strict=True):
            # A hit saves turns, so an abort finds the row farther on.
            both = min(len(one.token_ids), len(other.token_ids))
            assert abort or len(one.token_ids) == len(other.token_ids)
            assert one.token_ids[:both] == other.token_ids[:both]
            assert_near(one.logprobs[:both], other.logprobs[:both], TINY.of_row(other))
        seen += [list(row.prompt_ids + row.token_ids) for row in results[0]]
    assert on.status.prefix.hits > 0 or memory < 8 * model.info.row_bytes(120)


def counts(driver: Driver) -> tuple[int, ...]:
    status = driver.status.prefix
    return status.hits, status.misses, status.hit_tokens, status.asked_tokens


@pytest.mark.parametrize("family", some_long(["mamba2", "qwen3_next", "qwen3"], "mamba2", "qwen3"))
def test_a_row_that_comes_back_reads_behind_what_is_kept_of_its_prompt(
    family: str, bare_model: Models, model_path: Paths
) -> None:
    """Where state is kept whole, and where columns are."""
    on, off = pair(model_path(family), bare_model(family))
    (prompt,) = prompts_of([70], END)
    options: dict[str, Any] = {"n": 2, "seed": 3, "max_tokens": 20, "ignore_eos": True}
    expected = off.generate([prompt], **options)
    id = on.submit([prompt], **options)
    on.until(lambda: any(len(row.token_ids) > 5 for row in on.batches.rows))
    on.settle()
    row, read, counted = on.batches.rows[-1], on.batches.prefilled, counts(on)
    on.batches.evict(row)
    unread = row.offset - (len(prompt) - 1)
    on.finish(id)
    assert on.batches.prefilled - read == unread > 0
    on.turn()
    assert counts(on) == counted, "no prompt came"
    assert_all_same(on.rollouts(id), expected, tolerance(off, expected))
