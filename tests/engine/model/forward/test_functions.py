"""Attention and gate of a CPU against MLX's own; and models of one family share the modules of their classes, each on a
thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm.models.llama as llama
import mlx_lm.models.qwen3 as qwen3
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu as mlx_swiglu
from mlx_lm.models.base import create_causal_mask

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.forward import functions
from rollout_server.engine.model.forward.functions import attend, bound, modules_of, swiglu
from rollout_server.engine.model.kv_choice import choose_store
from rollout_server.engine.model.load import load
from tests.support import tiny_models
from tests.support.numbers.bounds import assert_near

NAME = "scaled_dot_product_attention"
Mask = Callable[[int, int, int], mx.array | str | None]
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    """These are a CPU's, which every machine has."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def per_row(batch: int, count: int, columns: int) -> mx.array:
    """Rows at columns of their own, the first of which may read nothing."""
    ends = mx.arange(batch)[:, None] * 3 + mx.arange(count)[None]
    ends = mx.where(mx.arange(batch)[:, None] == 0, -1, ends)
    return (mx.arange(columns) <= ends[..., None])[:, None]


MASKS: dict[str, Mask] = {
    "none": lambda batch, count, columns: None,
    "causal": lambda batch, count, columns: "causal",
    "bool [N, columns]": lambda batch, count, columns: create_causal_mask(count, columns - count),
    "bool [B, 1, N, columns]": per_row,
    "summand": lambda batch, count, columns: mx.where(per_row(batch, count, columns), 0.5, -1e9),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "count", "columns"), [(4, 4, 1, 33), (8, 2, 7, 40), (6, 3, 17, 17), (2, 1, 1, 1)]
)
def test_attention_is_mlx_s(mask: str, heads: int, kv_heads: int, count: int, columns: int) -> None:
    draw = np.random.default_rng(columns + heads)
    shapes = (3, heads, count, 16), (3, kv_heads, columns, 16), (3, kv_heads, columns, 24)
    queries, keys, values = (mx.array(draw.normal(size=shape).astype(np.float32)) for shape in shapes)
    made = MASKS[mask](3, count, columns)
    found = attend(queries, keys, values, 0.3, made)
    assert found is not None and found.shape == (3, heads, count, 24)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=made)
    # A weight is off by what the exponential is, 8e-6 of those that matter least and an eps of the largest; a score of
    # 16 products, of order 5, by a few eps. Values are of order 3.
    assert_near(found, expected, 3 * (16 * EPS * 5 + 4 * EPS))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores", [1, 100, 2000])
def test_parts_of_it_are_the_whole(mask: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, and queries of one row, one after another, so that long contexts take little memory."""
    draw = np.random.default_rng(0)
    shapes = (3, 4, 7, 16), (3, 2, 40, 16), (3, 2, 40, 24)
    arrays = [mx.array(draw.normal(size=shape).astype(np.float32)) for shape in shapes]
    whole = attend(*arrays, 0.3, MASKS[mask](3, 7, 40))
    monkeypatch.setattr(functions, "SCORES", scores)
    parts = attend(*arrays, 0.3, MASKS[mask](3, 7, 40))
    assert whole is not None and parts is not None and parts.shape == whole.shape
    assert_near(parts, whole, 3 * (16 * EPS * 5 + 4 * EPS))


def test_what_may_not_be_read_counts_for_nothing() -> None:
    """Exactly, whatever stands there: rows of one batch do not touch each other."""
    draw = np.random.default_rng(0)
    queries, keys, values = (mx.array(draw.normal(size=(1, 2, n, 8)).astype(np.float32)) for n in (1, 12, 12))
    mask = mx.arange(12)[None] < 7
    other = mx.where(mx.arange(12)[:, None] < 7, keys, 1e6), mx.where(mx.arange(12)[:, None] < 7, values, -1e6)
    found, again = attend(queries, keys, values, 1.0, mask), attend(queries, *other, 1.0, mask)
    assert found is not None and again is not None and bool(mx.array_equal(found, again))


def test_nan_stays() -> None:
    """What a poisoned version computes has to be seen."""
    x = mx.ones((1, 1, 2, 8))
    for poison in (mx.nan, mx.inf):
        keys = mx.where(mx.arange(8) == 3, poison, x)
        found = attend(x, keys - keys if poison == mx.inf else keys, x, 1.0, None)
        assert found is not None and bool(mx.all(mx.isnan(found)))
    gated = swiglu(mx.array([mx.nan, 1.0]), mx.array([1.0, mx.nan]))
    assert gated is not None and bool(mx.all(mx.isnan(gated)))


def test_the_gate_is_mlx_s_at_any_size() -> None:
    draw = np.random.default_rng(1)
    gate = np.concatenate([draw.normal(0, s, 4000) for s in (0.1, 1, 10, 60)] + [[0, -0.0, 87, -87, 1e4, -1e4]])
    gate = gate.astype(np.float32)
    x = draw.normal(size=gate.shape).astype(np.float32)
    found = swiglu(mx.array(gate), mx.array(x))
    wide = gate.astype(np.float64)
    exact = wide * x / (1 + np.exp(-np.clip(wide, -700, None)))
    assert found is not None
    # 8e-6 of itself is what the exponential is off by where it matters; below 1e-30 nothing does.
    np.testing.assert_allclose(np.array(found, dtype=np.float64), exact, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(
        np.array(found), np.array(mlx_swiglu(mx.array(gate), mx.array(x))), rtol=1e-5, atol=1e-30
    )


def test_other_dtypes_and_masks_of_heads_are_left_to_mlx() -> None:
    x = mx.ones((1, 2, 3, 4))
    half = x.astype(mx.bfloat16)
    assert attend(half, half, half, 1.0, None) is None and swiglu(half, half) is None
    assert attend(x, x, x, 1.0, mx.ones((1, 2, 3, 3), dtype=mx.bool_)) is None


def test_a_forward_computes_by_them_and_nothing_else_does(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(EngineOptions(str(qwen), "tiny"))
    assert set(model.attention.modules) == set(modules_of(model.module)) and qwen3 in model.attention.modules
    asked = list[str]()
    for name, function in (("attend", attend), ("swiglu", swiglu)):
        noted = partial(_noted, asked, name, function)
        monkeypatch.setattr(f"rollout_server.engine.model.forward.functions.{name}", noted)
    tokens = mx.array([[1, 2, 3, 4]])
    own = model.module(tokens)
    assert not asked
    ours = model.forward(tokens, model.make_caches())
    assert asked == ["attend", "swiglu"] * len(model.module.layers)
    assert_near(ours, own)
    assert qwen3.swiglu is mlx_swiglu


def _noted(asked: list[str], name: str, function: Callable[..., mx.array | None], *args: Any) -> mx.array | None:
    asked.append(name)
    return function(*args)


def test_a_model_that_it_changes_keeps_mlx_s_own(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = load(EngineOptions(str(qwen), "tiny")).module
    monkeypatch.setattr("rollout_server.engine.model.forward.functions.swiglu", lambda gate, x: gate)
    chosen = choose_store(module, tiny_models.VOCAB_SIZE, EngineOptions(str(qwen), "tiny"), compiles=False)
    assert chosen.kind == "slots" and chosen.attention.modules == ()
    assert "stay mlx's own" in caplog.text


def test_the_last_that_leaves_unbinds() -> None:
    own = getattr(llama, NAME)
    first, second = ExitStack(), ExitStack()
    first.enter_context(bound((llama,)))
    asking = getattr(llama, NAME)
    second.enter_context(bound((llama,)))
    assert asking is not own and getattr(llama, NAME) is asking, "it asks once, whoever is within"
    first.close()
    assert getattr(llama, NAME) is asking, "another forward is under way"
    second.close()
    assert getattr(llama, NAME) is own


def test_another_thread_s_model_computes_by_mlx_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of one family, of which one was found to be changed by our functions."""
    asked = list[str]()
    for name, function in (("attend", attend), ("swiglu", swiglu)):
        noted = partial(_noted, asked, name, function)
        monkeypatch.setattr(f"rollout_server.engine.model.forward.functions.{name}", noted)

    def compute() -> None:
        mx.set_default_stream(mx.new_stream(mx.cpu))
        x = mx.ones((1, 2, 3, 4))
        mx.eval(qwen3.swiglu(x, x), qwen3.scaled_dot_product_attention(x, x, x, cache=None, scale=1.0, mask=None))

    def compute_bound() -> None:
        with bound((qwen3,)):
            compute()

    with bound((qwen3,)), ThreadPoolExecutor() as other:
        other.submit(compute).result()
        assert not asked
        other.submit(compute_bound).result()
        assert asked == ["swiglu", "attend"]


def test_threads_find_it_bound_and_leave_it_as_it_was() -> None:
    module = ModuleType("family")
    own = mx.fast.scaled_dot_product_attention
    setattr(module, NAME, own)
    unbound = list[int]()

    def forwards() -> None:
        for turn in range(2000):
            with bound((module,)):
                if getattr(module, NAME) is own:
                    unbound.append(turn)

    threads = [threading.Thread(target=forwards) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unbound and getattr(module, NAME) is own
