"""Compiled decode steps against plain ones: same tokens, same numbers, keys and values written in place."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.model.forward.compiled import CompiledDecode, Unrouted
from rollout_server.engine.sampling.sampler import warm_sampler
from rollout_server.rollout import Rollout
from tests.support import tiny_models
from tests.support.engine.driver import Driver
from tests.support.numbers.bounds import TINY, assert_near

pytestmark = pytest.mark.skipif(
    mx.default_device() == mx.cpu and not shutil.which("g++"), reason="MLX compiles for the CPU with g++"
)

TOP_P = 0.9
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23, 24, 25, 26, 27, 28]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("compiled") / "model")


def rollouts(driver: Driver) -> list[Rollout]:
    """Base rows and rows of two unlike versions together, a push between two steps, and rows alone."""
    driver.push("a", driver.bundle(1, rank=4))
    driver.push("b", driver.bundle(2, rank=12, dora=True))
    ids = [
        driver.submit(PROMPTS, policy=name, n=2, seed=3, max_tokens=length, top_p=TOP_P, presence_penalty=0.5)
        for name, length in (("base", 40), ("a", 30), ("b", 35))
    ]
    driver.turn(9)
    driver.push("a", driver.bundle(3, rank=16))
    ids.append(driver.submit(PROMPTS, policy="a", seed=4, max_tokens=70))
    driver.finish(*ids)
    rows = [rollout for id in ids for rollout in driver.rollouts(id)]
    for name in ("a", "b", "base"):
        rows += driver.generate(PROMPTS, policy=name, seed=5, max_tokens=5)
    return rows


def test_compiled_steps_give_what_plain_ones_give(path: Path) -> None:
    plain = rollouts(Driver.start(path, compile_decode=False))
    driver = Driver.start(path, compile_decode=True)
    assert driver.model.compiles
    compiled = rollouts(driver)
    assert [row.token_ids for row in compiled] == [row.token_ids for row in plain]
    compared = 0
    for mine, theirs in zip(compiled, plain, strict=True):
        within = TINY.of_row(theirs)
        assert_near(mine.logprobs, theirs.logprobs, within)
        # Where what is kept comes to top-p but for rounding, one of them keeps a token more.
        kept = np.exp([mine.log_kept_mass, theirs.log_kept_mass]).min(axis=0)
        same = np.abs(kept - TOP_P) > within
        assert_near(np.array(mine.sampling_logprobs)[same], np.array(theirs.sampling_logprobs)[same], within)
        compared += np.count_nonzero(same)
    assert compared > 0.9 * sum(len(row.token_ids) for row in plain), "a token at the edge weighs some thousandths"


def test_a_compiled_step_writes_in_place(path: Path) -> None:
    model = Driver.start(path, compile_decode=False).model
    store = PaddedKV([None] * len(model.module.layers), 8)
    prompts = [Prompt(tuple(prompt), 0) for prompt in PROMPTS]
    for prompt in prompts:
        store.begin(prompt, 1, 16384)
    store.prefill(model.forward, [(prompt, len(prompt.tokens)) for prompt in prompts], lambda slots: None)
    offsets: list[int | None] = [len(prompt.tokens) for prompt in prompts]
    offsets += [None] * (store.capacity - len(offsets))
    decode = CompiledDecode(model.forward, store, Unrouted())
    store.set_positions(offsets, 16384)
    for _ in range(2):
        store.set_positions(offsets, 64)
        mx.eval(decode(mx.ones((store.capacity, 1), dtype=mx.int32), store.layers))
        store.evaluate()
    layer = store.nbytes // len(store.layers)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    logits = decode(mx.ones((store.capacity, 1), dtype=mx.int32), store.layers)
    mx.eval(logits)
    store.evaluate()
    assert mx.get_peak_memory() - before < layer / 2


def test_every_kind_of_sampler_can_be_warmed() -> None:
    """What runs before a GPU's server says that it is ready."""
    warm_sampler(40, mx.float16, 3)


def test_a_trace_that_fails_leaves_the_cache_as_it_was(path: Path) -> None:
    model = Driver.start(path, compile_decode=False).model
    store = PaddedKV([None] * len(model.module.layers), 4)
    prompt = Prompt((1, 2, 3), 0)
    store.begin(prompt, 1, 32)
    store.prefill(model.forward, [(prompt, 3)], lambda slots: None)
    before = [(layer.keys, layer.values) for layer in store.layers]

    def broken(tokens: mx.array, layers: list[object]) -> mx.array:
        logits = model.forward(tokens, layers)
        if float(logits[0, 0, 0]) > 0:
            raise RuntimeError("unreachable: a trace cannot be read")
        return logits

    store.set_positions([3] + [None] * (store.capacity - 1), 4)
    with pytest.raises((ValueError, RuntimeError)):
        CompiledDecode(broken, store, Unrouted())(mx.ones((store.capacity, 1), dtype=mx.int32), store.layers)
    assert all(
        layer.keys is keys and layer.values is values
        for layer, (keys, values) in zip(store.layers, before, strict=True)
    )
