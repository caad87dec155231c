"""The bounds of tests/support/numbers/bounds.py leave room for rounding, and none for the faults that they stand guard
against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model

from adapters.resident.model_layers import adaptable_layers
from tests.support import tiny_models
from tests.support.adapter_files import logits, make, merge, tokens
from tests.support.numbers.bounds import TINY, assert_near, relative

Change = Callable[[mx.array], mx.array]
TEXT = tokens(3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=2)


def with_change(path: Path, name: str, change: Change) -> np.ndarray:
    """Logits of the model in which one parameter is another."""
    model = load_model(path)[0]
    model.update(tree_unflatten([(name, change(dict(tree_flatten(model.parameters()))[name]))]))
    return logits(model, TEXT)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("self_attn.q_proj.bias", lambda bias: 0 * bias),
        ("self_attn.k_proj.weight", lambda weight: 1.001 * weight),
        ("mlp.down_proj.weight", lambda weight: weight.astype(mx.bfloat16).astype(mx.float32)),
        ("self_attn.o_proj.weight", lambda weight: weight.astype(mx.float16).astype(mx.float32)),
    ],
    ids=["no bias", "a thousandth too large", "rounded to bfloat16", "rounded to float16"],
)
def test_one_parameter_that_is_off_shows(path: Path, name: str, change: Change) -> None:
    right = logits(load_model(path)[0], TEXT)
    wrong = with_change(path, f"model.layers.1.{name}", change)
    assert np.abs(wrong - right).max() > 5 * TINY.of_logits(right, TEXT.shape[1])
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_near(wrong, right)


def test_a_scale_that_is_off_by_a_hundredth_in_one_projection_shows(path: Path) -> None:
    bundle = make(adaptable_layers(load_model(path)[0]))
    modules = dict(bundle.spec.modules)
    one = "model.layers.0.self_attn.k_proj"
    modules[one] = replace(modules[one], scale=1.01 * modules[one].scale)
    right, wrong = (
        logits(merge(load_model(path)[0], each), TEXT)
        for each in (bundle, replace(bundle, spec=replace(bundle.spec, modules=modules)))
    )
    assert np.abs(wrong - right).max() > 50 * TINY.of_logits(right, TEXT.shape[1])


def test_another_order_of_the_same_sum_stays_within_the_bound() -> None:
    random = np.random.default_rng(0)
    for terms in (16, 96, 1000):
        values = random.standard_normal((10_000, terms)).astype(np.float32)
        sums = [np.cumsum(each, axis=1, dtype=np.float32) for each in (values, values[:, ::-1])]
        largest = max(float(np.abs(each).max()) for each in sums)
        gaps = np.abs(sums[0][:, -1] - sums[1][:, -1])
        assert gaps.max() <= relative(terms) * largest
        assert gaps.max() > relative(terms) * largest / 30, "nor is it far from what happens"


def test_a_longer_deeper_and_larger_computation_has_more_room() -> None:
    one = TINY.of_logits([1.0, -8.0], 10)
    assert one < TINY.of_logits([1.0, -8.0], 1000) and one < replace(TINY, depth=6).of_logits([1.0, -8.0], 10)
    assert TINY.of_logits([16.0], 10) == 2 * one
    assert TINY.of_logprobs([-8.0, math.nan], 10) == TINY.of_logprobs([], 10) > one
