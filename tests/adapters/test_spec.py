"""What an adapter is, before any tensor: scales, shapes and their places, and a stranger's values in a sentence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adapters.errors import SHOWN_CHARACTERS, AdapterUnreadable
from adapters.spec import (
    AdapterSpec,
    EmbeddingShape,
    ExpertsShape,
    ModuleSpec,
    TiedEmbeddingShape,
    TiedHeadShape,
    ends,
    experts_of,
    fields_shown,
    lora_scale,
    place_of,
    quoted,
    to_float32,
)


def test_a_scale_is_divided_in_float64_and_rounded_once() -> None:
    assert lora_scale(16, 8, rank_stabilised=False) == 2.0
    assert lora_scale(1, 3, rank_stabilised=False) == float(np.float32(1 / 3)) != 1 / 3
    assert lora_scale(8, 2, rank_stabilised=True) == float(np.float32(8 / math.sqrt(2)))
    # Rounded before the division, it would be another number.
    alpha = 1 + 2**-30
    assert lora_scale(alpha * 2**30, 2**30 + 1, rank_stabilised=False) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.5e38, -1e300])
def test_a_scale_that_float32_does_not_hold_is_refused(value: float) -> None:
    with pytest.raises(AdapterUnreadable, match="not a finite float32"):
        to_float32(value)


def test_the_largest_float32_is_one() -> None:
    most = float(np.finfo(np.float32).max)
    assert to_float32(most) == most and to_float32(-most) == -most
    assert to_float32(1e-46) == 0.0


@pytest.mark.parametrize(
    ("shape", "place", "experts"),
    [
        ((4, 2), "linear", ()),
        (EmbeddingShape(4, 2), "embedding", ()),
        (TiedEmbeddingShape(4, 2), "tied_embedding", ()),
        (TiedHeadShape(4, 2), "tied_head", ()),
        (ExpertsShape(4, 2, 8), "experts", (8,)),
    ],
)
def test_a_shape_is_two_numbers_and_knows_its_place(shape: Any, place: str, experts: tuple[int, ...]) -> None:
    out, width = shape
    assert (out, width) == (4, 2) and shape == (4, 2)
    assert place_of(shape) == place
    assert experts_of(shape) == experts


def test_a_layer_is_named_by_what_stands_behind_a_dot() -> None:
    assert list(ends("layers.0.q_proj")) == ["layers.0.q_proj", "0.q_proj", "q_proj"]
    assert list(ends("lm_head")) == ["lm_head"]


def test_an_adapter_is_the_same_in_whatever_order_its_file_has_it() -> None:
    a, b = ModuleSpec(2, 1.0), ModuleSpec(4, 0.5)
    one = AdapterSpec("lora", {"b": b, "a": a}, dense=("y", "x"), head=("score.weight", "score.bias"))
    other = AdapterSpec("lora", {"a": a, "b": b}, dense=("x", "y"), head=("score.bias", "score.weight"))
    assert one == other and list(one.modules) == ["a", "b"] and one.dense == ("x", "y")
    with pytest.raises(TypeError):
        one.modules["c"] = a  # type: ignore[index]


def test_only_what_has_low_rank_parts_can_be_served_in_a_slot() -> None:
    for kind, parts in (("lora", 2), ("dora", 3)):
        spec = AdapterSpec(kind, {})  # type: ignore[arg-type]
        assert spec.modes == ("adapter", "merged") and len(spec.parts) == parts
    assert AdapterSpec("delta", {}).modes == AdapterSpec("full", {}).modes == ("merged",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (4, "4"),
        ("4", "'4'"),
        (0.5, "0.5"),
        (["a", 1, [False]], "['a', 1, [false]]"),
        ({"r": None}, "{'r': null}"),
        (10**SHOWN_CHARACTERS - 1, "9" * SHOWN_CHARACTERS),
        (-(10**SHOWN_CHARACTERS), f"a number of more than {SHOWN_CHARACTERS} digits"),
    ],
)
def test_a_value_is_told_as_json_has_it(value: object, text: str) -> None:
    assert quoted(value) == text


def test_no_value_makes_a_sentence_long_or_never_end() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "something deeply nested"
    for value in ("x" * 10**6, ["x"] * 10**6, {str(at): at for at in range(10**5)}):
        assert len(quoted(value)) < 2 * SHOWN_CHARACTERS
    while deep:  # or its end would be as deep as its making
        deep = deep.pop()


def test_of_many_fields_the_first_are_told_and_the_others_counted() -> None:
    fields = {f"f{at}": at for at in range(5)}
    whole = "'f0' = 0, 'f1' = 1, 'f2' = 2, 'f3' = 3, 'f4' = 4"
    assert fields_shown(fields) == whole
    assert fields_shown(fields | {"f5": 5, "f6": 6}) == f"{whole} and 2 more"
