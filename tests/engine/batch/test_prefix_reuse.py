"""KV kept for later requests changes nothing but the time: ids are the same with and without it, and log-probabilities
within the tolerance of other batch shapes. What must not be shared is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.batch.prefix_reuse import BLOCK_TOKENS, PrefixReuse, Wanted
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.store import Seating
from rollout_server.engine.messages.control import PrefixCacheReset, ResetPrefixCache
from rollout_server.engine.messages.versions import Delete
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.rollout import Rollout
from tests.engine.batch.test_batch import SLOTS, assert_same, tolerance
from tests.laws.grids import some_long
from tests.support.engine.door import broken_steps, wrap_forwards
from tests.support.engine.driver import Driver, prompts_of
from tests.support.numbers.bounds import TINY, assert_near

Models = Callable[[str], ResidentModel]


def pair(path: Path, model: ResidentModel, **options: Any) -> tuple[Driver, Driver]:
    """The same engine with and without."""
    return Driver.start(path, model, **options), Driver.start(path, model, prefix_cache=False, **options)


def assert_all_same(ones: list[Rollout], others: list[Rollout], within: float) -> None:
    for one, other in zip(ones, others, strict=True):
        assert_same(one, other, within)


@pytest.mark.parametrize("family", some_long(SLOTS, "qwen3", "gpt_oss"))
def test_turns_of_a_conversation(family: str, bare_model: Models, model_path: Callable[[str], Path]) -> None:
    model = bare_model(family)
    on, off = pair(model_path(family), model, prefill_tokens=48)
    prompt = prompts_of([70], model.info.vocab_size)[0]
    for turn in range(3):
        options: dict[str, Any] = {"n": 3, "seed": turn, "max_tokens": 8, "ignore_eos": True}
        found, expected = on.generate([prompt], **options), off.generate([prompt], **options)
        assert_all_same(found, expected, tolerance(off, expected))
        assert {row.cached_tokens for row in expected} == {0}
        # All of the turn before but the token that was sampled last, which nobody read.
        before = len(prompt) - 7 - 1
        assert [row.cached_tokens for row in found] == [0 if turn == 0 else before] * 3
        prompt = [*prompt, *found[1].token_ids, *prompts_of([7], model.info.vocab_size, seed=turn)[0]]
    status = on.status.prefix
    assert (status.hits, status.misses) == (2, 1) and status.nbytes > 0
    assert off.status.prefix.on is False and off.status.prefix.nbytes == 0


def test_a_prompt_that_is_there_whole_is_not_read(base: Driver, qwen: Path) -> None:
    (prompt,) = prompts_of([40], 286)
    first = base.generate([prompt], seed=1)
    fed = base.batches.prefilled
    again = base.generate([prompt], seed=1)
    assert base.batches.prefilled == fed and again[0].cached_tokens == 39
    assert_all_same(again, first, tolerance(base, first))


def test_equal_prompts_of_one_moment_are_read_once(base: Driver, qwen: Path) -> None:
    """A group may come as n prompts of one sample."""
    (prompt,) = prompts_of([50], 286)
    rows = base.generate([prompt] * 6, seed=4)
    assert base.batches.prefilled == 49
    assert sorted(row.cached_tokens for row in rows) == [0] + [49] * 5
    expected = Driver.start(qwen, base.model, prefix_cache=False).generate([prompt] * 6, seed=4)
    assert_all_same(rows, expected, tolerance(base, rows))


def test_versions_never_share(driver: Driver, qwen: Path) -> None:
    (prompt,) = prompts_of([40], 286)
    one, two = driver.bundle(1), driver.bundle(2, dora=True)
    driver.push("p", one)
    driver.push("q", two)
    for policy in ("base", "p", "q"):
        assert driver.generate([prompt], policy=policy, max_tokens=2)[0].cached_tokens == 0
    # Equal content is the same KV, whatever its name.
    driver.push("r", one)
    assert driver.generate([prompt], policy="r", max_tokens=2)[0].cached_tokens == 39
    # A new version of a name starts anew, merged or not.
    driver.push("p", two, mode="merged")
    merged = driver.generate([prompt], policy="p", seed=5)[0]
    assert merged.cached_tokens == 0
    alone = Driver.start(qwen, prefix_cache=False)
    alone.push("p", alone.bundle(2, dora=True), mode="merged")
    assert_same(merged, alone.generate([prompt], policy="p", seed=5)[0], TINY.of_row(merged))


def test_what_was_read_under_a_deleted_version_goes(driver: Driver) -> None:
    (prompt,) = prompts_of([40], 286)
    driver.push("p", driver.bundle(1))
    running = driver.submit([prompt], policy="p", max_tokens=30, ignore_eos=True)
    driver.turn(4)
    assert driver.status.prefix.nbytes > 0
    driver.change(Delete("", "p"))
    driver.turn()
    assert driver.status.prefix.nbytes == 0
    driver.finish(running)
    driver.turn(3)
    assert driver.status.prefix.nbytes == 0, "a row that outlives its version leaves nothing"


def test_rows_that_switched_are_not_kept(driver: Driver, qwen: Path) -> None:
    (prompt,) = prompts_of([40], 286)
    driver.push("p", driver.bundle(1))
    id = driver.submit([prompt], policy="p", on_update="switch", max_tokens=30, ignore_eos=True)
    driver.turn(8)
    driver.push("p", driver.bundle(2))
    driver.finish(id)
    (row,) = driver.rollouts(id)
    assert len(row.spans) == 2
    longer = [*prompt, *row.token_ids]
    for policy, expected in (("p@1", 39), ("p@2", 0)):
        assert driver.generate([longer], policy=policy, max_tokens=2)[0].cached_tokens == expected


def test_rows_that_failed_take_their_tree_along(qwen: Path) -> None:
    driver = Driver.start(qwen)
    (prompt,) = prompts_of([40], 286)
    id = driver.submit([prompt], max_tokens=30, ignore_eos=True)
    driver.turn(3)
    assert driver.status.prefix.nbytes > 0
    undo = wrap_forwards(driver.batch(0), lambda forward: lambda tokens, caches: forward(tokens, caches) * mx.nan)
    driver.finish(id)
    undo()
    driver.turn(3)
    assert driver.rollouts(id)[0].error is not None and driver.status.prefix.nbytes == 0
    assert driver.generate([prompt])[0].cached_tokens == 0


def test_a_failed_step_forgets_everything(base: Driver) -> None:
    (prompt,) = prompts_of([40], 286)
    base.generate([prompt])
    with broken_steps(base.batch(0)):
        base.finish(base.submit([prompt]))
    assert base.status.prefix.nbytes == 0


def test_reset(base: Driver) -> None:
    (prompt,) = prompts_of([40], 286)
    base.generate([prompt])
    held = base.status.prefix.nbytes
    base.send(ResetPrefixCache("x"))
    base.turn()
    assert base.events[-1] == PrefixCacheReset("x", held) and base.status.prefix.nbytes == 0
    assert base.generate([prompt])[0].cached_tokens == 0


def test_rows_come_first(bare_model: Models, qwen: Path) -> None:
    """Rows and what is kept stay inside --kv-memory together, and nothing that is kept delays a row."""
    model = bare_model("qwen3")
    limit = 8 * 96 * model.info.kv_bytes_per_token
    small = replace(model, info=replace(model.info, kv_memory=limit, max_batch=64))
    on, off = pair(qwen, small)
    for driver in (on, off):
        driver.generate(prompts_of([30] * 4, 286, seed=3), max_tokens=20)
    prompts = prompts_of([20, 45, 30] * 6, 286)
    # Some end while the others run: what they leave is kept until the next rows need the room.
    lengths = [(prompts[at::3], 40 - 12 * at) for at in range(3)]
    ids = [
        [driver.submit(some, max_tokens=length, ignore_eos=True) for some, length in lengths] for driver in (on, off)
    ]
    most, kept = 0, 0
    while not all(on.over(id) for id in ids[0]):
        on.turn()
        off.turn()
        assert on.status.running == off.status.running
        most = max(most, on.batch(0).store.nbytes + on.status.prefix.nbytes)  # type: ignore[attr-defined]
        kept = max(kept, on.status.prefix.nbytes)
    assert kept > 0 and most <= limit and on.status.prefix.evictions > 0
    for one, other in zip(*ids, strict=True):
        rows = on.rollouts(one)
        assert_all_same(rows, off.rollouts(other), max(map(TINY.of_row, rows)))


def test_places_are_copied_a_few_together() -> None:
    """What several places hold is found again number by number, and one that is used again keeps no more than its block
    from being evicted."""
    draw, length = np.random.default_rng(0), BLOCK_TOKENS // 3 - 20
    store = PaddedKV([None, None], 8)
    held = draw.random((8, 2, 2, 2, length, 4), dtype=np.float32)
    prompts = [
        Prompt(
            tuple(draw.integers(0, 9999, length).tolist()), 0, length, kept=[tuple(map(mx.array, pair)) for pair in own]
        )
        for own in held
    ]
    for prompt in prompts:
        store.begin(prompt, 1, length)
    places = [place for (place,) in store.seat([Seating(prompt, 1) for prompt in prompts])]
    token_bytes = held[0, :, :, :, 0].nbytes
    reuse = PrefixReuse(token_bytes, "base", store, on=True)
    reuse.fit(8 * length)
    key = ("base", False, False)
    mx.eval(reuse.keep(store, [Wanted(place, key, each.tokens) for place, each in zip(places, prompts, strict=True)]))
    assert reuse.cells == 8 * length
    for own, prompt in zip(held, prompts, strict=True):
        (found,) = reuse.find(key, prompt.tokens)
        assert found.count == length
        for pair, arrays in zip(found.layers, own, strict=True):
            assert pair is not None and all(map(np.array_equal, map(np.array, pair), arrays))
    assert reuse.find(key, prompts[0].tokens)
    reuse.fit(BLOCK_TOKENS)
    assert reuse.find(key, prompts[0].tokens) and reuse.cells == 3 * length
    assert not reuse.find(key, prompts[7].tokens)


def test_copies_hold_up_no_write(base: Driver) -> None:
    """A copy that is still to be made when the next step writes would copy the whole array."""
    id = base.submit(prompts_of([1400] + [10] * 39, 286), max_tokens=60, ignore_eos=True)
    ending = base.submit(prompts_of([12] * 8, 286, seed=2), max_tokens=9, ignore_eos=True)
    base.until(lambda: base.status.running == 48 and not base.batches.joining)
    store: Any = base.batch(0).store
    per_layer = store.nbytes / len(store.layers)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    kept = base.status.prefix.nbytes
    base.finish(ending)
    base.turn(2)
    assert base.status.prefix.nbytes > kept
    assert mx.get_peak_memory() - before < 0.5 * per_layer
    base.abort(id)
    base.finish(id)


@pytest.mark.parametrize("seed", some_long(range(4), 0))
def test_random_beginnings_under_pressure(seed: int, bare_model: Models, qwen: Path) -> None:
    """Prompts that share what chance gives them, rows that end anywhere, little memory: as without."""
    model = bare_model("qwen3")
    chance = random.Random(seed)
    memory = chance.choice([6, 20, 200]) * 128 * model.info.kv_bytes_per_token
    small = replace(model, info=replace(model.info, kv_memory=memory))
    on, off = pair(qwen, small, max_batch=6, prefill_tokens=chance.choice([16, 64, 512]))
    seen = prompts_of([chance.randrange(1, 60) for _ in range(5)], 286, seed=seed)
    for _ in range(5):
        prompts = []
        for _ in range(chance.randrange(1, 5)):
            stem = chance.choice(seen)
            tail = [chance.randrange(286) for _ in range(chance.randrange(12))]
            prompts.append([*stem[: chance.randrange(1, len(stem) + 1)], *tail][:80])
        options: dict[str, Any] = {"n": chance.randrange(1, 4), "max_tokens": chance.randrange(1, 20)}
        options |= {"seed": chance.randrange(100), "top_p": 0.9}
        abort = chance.random() < 0.3
        results = []
        for driver in (on, off):
            id = driver.submit(prompts, **options)
            if abort:
                driver.turn(6)
                driver.abort(id)
            driver.finish(id)
            results.append(driver.rollouts(id))
        for one, other in zip(*results, strict=True):
            # A hit saves turns, so an abort finds the row farther on.
            both = min(len(one.token_ids), len(other.token_ids))
            assert abort or len(one.token_ids) == len(other.token_ids)
            assert one.token_ids[:both] == other.token_ids[:both]
            assert_near(one.logprobs[:both], other.logprobs[:both], TINY.of_row(other))
        seen += [list(row.prompt_ids + row.token_ids) for row in results[0]]
    store: Any = on.batch(0).store
    assert on.status.prefix.nbytes <= memory and (on.status.prefix.hits > 0 or memory < 10 * 128)
    assert store.nbytes <= memory


def test_rows_that_end_together_are_told_of_at_once_and_all_kept(base: Driver) -> None:
    id = base.submit(prompts_of([20], base.model.info.vocab_size), n=40, max_tokens=8, ignore_eos=True)
    base.until(lambda: base.over(id))
    assert base.batches.size >= 40 - 16, "the reply waits for no copies of the others"
    base.until(lambda: not base.batches.active, turns=4)
    again = [(*row.prompt_ids, *row.token_ids) for row in base.rollouts(id)]
    assert [row.cached_tokens for row in base.generate(again, max_tokens=2, ignore_eos=True)] == [27] * 40
