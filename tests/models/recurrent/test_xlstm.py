"""The mLSTM in chunks of any size is the recurrence written out, padding changes nothing, and fused layers are the same
layers. Against transformers: tests/golden."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache

from rollout_server.models.recurrent.xlstm import Chunk, Model, ModelArgs, State, read_chunk
from tests.support.numbers.bounds import assert_near, relative

ARGS = ModelArgs("xlstm", 40, 16, 2, 2, chunk_size=4, ffn_round_up_to_multiple_of=4, use_bias=True)
HEADS, KEYS, VALUES, EPS = 2, 5, 3, 1e-6


def written_out(chunk: Chunk) -> np.ndarray:
    """Equations 21 to 27 of arXiv:2405.04517, token by token in float64, without any scaling by m."""
    q, k, v, i, f = (np.array(part).astype(np.float64) for part in (chunk.q, chunk.k, chunk.v, chunk.i, chunk.f))
    found = np.zeros((*q.shape[:3], v.shape[-1]))
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            c, n = np.zeros((q.shape[-1], v.shape[-1])), np.zeros(q.shape[-1])
            for at in range(q.shape[2]):
                forget, take = 1 / (1 + np.exp(-f[row, head, at])), np.exp(i[row, head, at])
                c = forget * c + take * np.outer(k[row, head, at], v[row, head, at])
                n = forget * n + take * k[row, head, at]
                query = q[row, head, at] / np.sqrt(q.shape[-1])
                found[row, head, at] = query @ c / max(abs(query @ n), 1)
    return found


def part_of(chunk: Chunk, start: int, end: int) -> Chunk:
    return Chunk(*(part[:, :, start:end] for part in (chunk.q, chunk.k, chunk.v, chunk.i, chunk.f)))


@pytest.mark.parametrize("size", [1, 3, 7, 24])
def test_chunks_of_any_size_are_the_recurrence(size: int) -> None:
    mx.random.seed(1)
    q, k = mx.random.normal((2, HEADS, 24, KEYS)), mx.random.normal((2, HEADS, 24, KEYS))
    v, gates = mx.random.normal((2, HEADS, 24, VALUES)), 3 * mx.random.normal((2, 2, HEADS, 24))
    whole = Chunk(q, k, v, gates[0], gates[1])
    state = State(mx.zeros((2, HEADS, KEYS, VALUES)), mx.zeros((2, HEADS, KEYS)), mx.zeros((2, HEADS, 1)))
    found = []
    for start in range(0, 24, size):
        h, state = read_chunk(part_of(whole, start, start + size), state, EPS)
        found.append(h)
    expected = written_out(whole)
    # eps is added to a divisor that m scales down to exp(-15) at least.
    assert_near(mx.concatenate(found, axis=2), expected, relative(24 + KEYS) * np.abs(expected).max() * 50)


def test_gates_at_their_caps_overflow_nothing() -> None:
    state = State(mx.zeros((1, 1, KEYS, VALUES)), mx.zeros((1, 1, KEYS)), mx.zeros((1, 1, 1)))
    ones = mx.ones((1, 1, 64, KEYS))
    for i, f in [(15.0, 15.0), (15.0, -15.0), (-15.0, 15.0), (-15.0, -15.0)] * 8:
        h, state = read_chunk(
            Chunk(ones, ones, ones[..., :VALUES], mx.full((1, 1, 64), i), mx.full((1, 1, 64), f)), state, EPS
        )
        assert all(bool(mx.isfinite(part).all()) for part in (h, state.c, state.n, state.m))


def random_model(args: ModelArgs, seed: int = 0) -> Model:
    mx.random.seed(seed)
    model = Model(args)
    model.update(tree_map(lambda array: 0.4 * mx.random.normal(array.shape), model.parameters()))
    return model


def test_a_row_is_what_it_is_whatever_pads_it() -> None:
    model = random_model(ARGS)
    lengths, rows = (9, 1, 14), mx.random.randint(0, 40, (3, 14))
    caches: list[Any] = model.make_cache()
    for cache in caches:
        cache.prepare(lengths=list(lengths))
    together = [model(rows[:, :5], caches), model(rows[:, 5:], caches)]
    for cache in caches:
        cache.finalize()
    again = model(rows[:, :1], caches)
    for row, length in enumerate(lengths):
        own = model.make_cache()
        alone = model(rows[row : row + 1, :length], own)
        bound = relative(14 * 40) * max(1.0, float(mx.abs(alone).max()))
        assert_near(mx.concatenate(together, axis=1)[row, :length], alone[0], bound)
        assert_near(again[row], model(rows[row : row + 1, :1], own)[0], bound)


def test_fused_layers_are_the_same_layers() -> None:
    single, fused = random_model(ARGS), Model(replace(ARGS, weight_mode="fused"))
    weights: dict[str, mx.array] = dict(tree_flatten(single.parameters()))  # type: ignore[arg-type]
    joined = {
        "mlstm_layer.qkv_opreact": [f"mlstm_layer.{name}" for name in ("q", "k", "v", "ogate_preact")],
        "mlstm_layer.ifgate_preact": ["mlstm_layer.igate_preact", "mlstm_layer.fgate_preact"],
        "ffn.proj_up_gate_z": ["ffn.proj_up_gate", "ffn.proj_up"],
    }
    for at in range(ARGS.num_hidden_layers):
        for whole, parts in joined.items():
            for end in ("weight", "bias"):
                names = [f"backbone.blocks.{at}.{part}.{end}" for part in parts]
                weights[f"backbone.blocks.{at}.{whole}.{end}"] = mx.concatenate([weights.pop(name) for name in names])
    fused.load_weights(list(weights.items()))
    tokens = mx.random.randint(0, 40, (2, 11))
    expected = single(tokens)
    assert_near(fused(tokens), expected, relative(11 * 40) * max(1.0, float(mx.abs(expected).max())))


def test_what_is_kept_of_a_row_is_float32_and_does_not_grow() -> None:
    model = random_model(ARGS)
    model.set_dtype(mx.bfloat16)
    caches: list[ArraysCache] = model.make_cache()
    logits = model(mx.array([[1, 2, 3]]), caches)
    size = sum(cache.nbytes for cache in caches)
    model(mx.array([[1] * 30]), caches)
    assert logits.dtype == mx.bfloat16 and sum(cache.nbytes for cache in caches) == size
    assert {part.dtype for cache in caches for part in cache.cache} == {mx.float32}
