"""What files of whole tensors may say of themselves, and which parameters they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapters.errors import AdapterUnreadable, AdapterUnsupported
from adapters.formats.fit import Proposal
from adapters.formats.whole_tensors import read
from adapters.spec import NO_SCORING, Parameter, Scoring
from adapters.tensors import FileTensor

NAMES = ("q.weight", "norm.weight")
PARAMETERS = {f"model.layers.{at}.{name}": Parameter((4,), "float32") for at in range(3) for name in NAMES}
PARAMETERS |= {"model.layers.2.k.weight": Parameter((4, 4), "float32", quantised=True)}
PARAMETERS |= {"model.norm.weight": Parameter((4,), "float32"), "tower.0.weight": Parameter((4,), "float32")}


def proposed(*names: str, scoring: Scoring = NO_SCORING, **config: Any) -> Proposal:
    tensors = {name: FileTensor(name, "F32", (1, 4), np.zeros((1, 4), np.float32).tobytes()) for name in names}
    return read(tensors, config, PARAMETERS, scoring)


@pytest.mark.parametrize("config", [{"kind": "full"}, {"kind": "delta"}, {"fine_tune_type": "full", "num_layers": -1}])
def test_tensors_are_found_under_the_base_s_names_and_under_peft_s(config: dict[str, Any]) -> None:
    found = proposed("base_model.model.model.norm.weight", "lm_head.weight", **config)
    assert list(found.dense) == ["model.norm.weight", "lm_head.weight"] and not found.strangers
    assert found.spec.kind == config.get("kind", "full")


def test_a_tensor_that_comes_under_both_names_is_told() -> None:
    (fault,) = proposed("base_model.model.model.norm.weight", "model.norm.weight", kind="full").strangers
    assert "model.norm.weight is there twice" in fault.sentence


def test_only_what_takes_the_base_s_place_has_a_head() -> None:
    scorer = Scoring(4, "classify")
    full = proposed("score.weight", "model.norm.weight", scoring=scorer, kind="full")
    assert full.spec.head == ("score.weight",) and full.spec.task == "classify" and list(full.dense) == [NORM]
    delta = proposed("score.weight", scoring=scorer, kind="delta")
    assert not delta.spec.head and list(delta.dense) == ["score.weight"]


NORM = "model.norm.weight"
BLOCKS = [[f"model.layers.{at}.{name}" for name in NAMES] for at in range(3)]


@pytest.mark.parametrize(
    ("count", "blocks"), [(1, BLOCKS[2:]), (2, BLOCKS[1:]), (3, BLOCKS), (9, BLOCKS), (0, BLOCKS), (-1, BLOCKS)]
)
def test_mlx_lm_promises_what_is_not_quantised_of_the_last_blocks(count: int, blocks: list[list[str]]) -> None:
    found = proposed(fine_tune_type="full", num_layers=count)
    assert sorted(found.promised) == sorted(path for block in blocks for path in block)
    assert not proposed(fine_tune_type="full", kind="full", num_layers=count).promised, "it holds what it holds"


@pytest.mark.parametrize("count", [None, True, 1.0, "1"])
def test_a_number_of_blocks_is_a_whole_number(count: object) -> None:
    with pytest.raises(AdapterUnreadable, match="num_layers must be a whole number"):
        proposed(fine_tune_type="full", num_layers=count)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"kind": "full", "peft_type": "LORA"}, "peft_type"),
        ({"kind": "delta", "r": 8}, "r"),
        ({"fine_tune_type": "full", "num_layers": 1, "target_modules": ["q_proj"]}, "target_modules"),
        ({"kind": "full", "fine_tune_type": "lora"}, "fine_tune_type"),
        ({"kind": "delta", "fine_tune_type": "full"}, "kind"),
    ],
)
def test_two_kinds_in_one_file_are_refused_by_the_field(config: dict[str, Any], field: str) -> None:
    with pytest.raises(AdapterUnsupported, match="contradicts") as caught:
        proposed(NORM, **config)
    assert list(caught.value.fields) == [field]


def test_a_field_that_means_nothing_there_is_refused_unless_it_says_nothing() -> None:
    empty: dict[str, Any] = {"target_modules": [], "r": None, "use_dora": False, "revision": "main"}
    assert proposed(NORM, kind="full", **empty).dense
    with pytest.raises(AdapterUnsupported, match="mean nothing beside kind 'full': leave them out") as caught:
        proposed(NORM, kind="full", use_dora=True, rank=8)
    assert set(caught.value.fields) == {"use_dora", "rank"}
