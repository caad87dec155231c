"""Whole tensors of PEFT's files: which of the base's parameters each one is, by its name alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapters.errors import AdapterUnsupported
from adapters.formats.peft_names import names_in
from adapters.formats.peft_saved_modules import Saved, is_head, saved_in
from adapters.spec import EmbeddingShape, ModuleSpec, Parameter, Scoring, TiedEmbeddingShape, TiedHeadShape
from adapters.tensors import FileTensor

PEFT = "base_model.model."
Q, TABLE = "model.layers.0.q_proj", "model.embed_tokens"
LAYERS: dict[str, tuple[int, int]] = {Q: (4, 4), TABLE: EmbeddingShape(4, 8), "lm_head": (8, 4)}
TIED: dict[str, tuple[int, int]] = {Q: (4, 4), TABLE: TiedEmbeddingShape(4, 8), "lm_head": TiedHeadShape(8, 4)}
PATHS = (f"{Q}.weight", f"{Q}.bias", f"{TABLE}.weight", "model.norm.weight", "lm_head.weight")
PARAMETERS = {path: Parameter((4,), "float32") for path in PATHS}


def saved(
    *names: str,
    wanted: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
    layers: dict[str, tuple[int, int]] = LAYERS,
    config: dict[str, Any] | None = None,
    scoring: Scoring | None = None,
) -> Saved:
    tensors = {name: FileTensor(name, "F32", (1, 4), np.zeros((1, 4), np.float32).tobytes()) for name in names}
    specs = {module: ModuleSpec(2, 1.0) for module in modules}
    called = names_in(layers, modules)
    return saved_in(tensors, wanted, config or {}, called, specs, layers, PARAMETERS, scoring or Scoring())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"{PEFT}model.norm.weight", "model.norm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        (f"{PEFT}model.norm.modules_to_save.weight", "model.norm.weight"),
        (f"{PEFT}model.norm.modules_to_save.default.weight", "model.norm.weight"),
    ],
)
def test_a_saved_module_is_found_under_each_name_that_peft_gave_it(name: str, path: str) -> None:
    found = saved(name, wanted=("norm",))
    assert {path: tensor.name for path, tensor in found.dense.items()} == {path: name}
    assert found.promised == (path,) and not found.strangers and not found.faults


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        ("q_proj", [f"{Q}.weight", f"{Q}.bias"]),
        ("proj", [f"{Q}.weight", f"{Q}.bias"]),
        ("layers.0", [f"{Q}.weight", f"{Q}.bias"]),
        ("model", list(PATHS[:4])),
        ("norm", ["model.norm.weight"]),
    ],
)
def test_a_name_saves_all_that_a_module_holds_whose_path_ends_with_it(wanted: str, paths: list[str]) -> None:
    assert list(saved(wanted=(wanted,)).promised) == paths


def test_names_that_are_no_modules_are_told_one_by_one_but_for_those_that_peft_adds_of_itself() -> None:
    found = saved(wanted=("nrm", "norm", "", "weight"))
    assert [fault.example for fault in found.faults] == ["nrm", "", "weight"] and found.promised == (PATHS[3],)
    both = ("classifier", "score")
    assert len(saved(wanted=both).faults) == 2
    assert not saved(wanted=both, scoring=Scoring(4, "classify")).faults, "a classifier has one of the two"


def test_tables_and_output_layers_are_whole_tensors_though_nobody_names_them() -> None:
    found = saved(f"{PEFT}{TABLE}.weight", f"{PEFT}lm_head.weight", f"{PEFT}{Q}.weight", f"{PEFT}model.norm.weight")
    assert list(found.dense) == ["lm_head.weight", f"{TABLE}.weight"] and not found.promised
    assert [fault.example for fault in found.strangers] == [f"{PEFT}{Q}.weight", f"{PEFT}model.norm.weight"]


def test_the_weight_below_a_low_rank_part_is_whole_only_where_that_part_is_targeted() -> None:
    name = f"{PEFT}{TABLE}.base_layer.weight"
    assert list(saved(name, modules=(TABLE,)).dense) == [f"{TABLE}.weight"]
    (fault,) = saved(name).strangers
    assert "the base's own weight of a layer that the configuration does not target" in fault.sentence
    (fault,) = saved(f"{PEFT}{Q}.lora_C").strangers
    assert "no lora_A or lora_B weight" in fault.sentence


def test_a_parameter_that_comes_twice_is_told() -> None:
    names = (f"{PEFT}model.norm.modules_to_save.weight", f"{PEFT}model.norm.weight")
    (fault,) = saved(*names, wanted=("norm",)).faults
    assert all(name in fault.sentence for name in names)


def test_a_table_that_is_the_head_s_too_is_refused_where_only_one_of_them_comes() -> None:
    table, head = f"{PEFT}{TABLE}.weight", f"{PEFT}lm_head.weight"
    with pytest.raises(AdapterUnsupported, match=rf"{TABLE}\.weight but not lm_head\.weight"):
        saved(table, layers=TIED)
    assert set(saved(table, head, layers=TIED).dense) == {f"{TABLE}.weight", "lm_head.weight"}
    assert list(saved(head, layers=TIED).dense) == ["lm_head.weight"]
    below = f"{PEFT}{TABLE}.base_layer.weight"
    assert list(saved(below, layers=TIED, modules=(TABLE,)).dense) == [f"{TABLE}.weight"], "PEFT adds it of itself"


def test_a_head_for_labels_is_no_parameter_of_the_base_and_no_stranger() -> None:
    found = saved(
        f"{PEFT}score.weight", wanted=("classifier", "score"), config={"task_type": "SEQ_CLS"}, scoring=Scoring(4)
    )
    assert found.head.task == "classify" and list(found.head.tensors) == ["score.weight"]
    assert not found.dense and not found.strangers and not found.faults


def test_an_output_layer_is_called_so_outside_of_blocks() -> None:
    assert all(map(is_head, ("lm_head", "model.output", "embed_out")))
    assert not any(map(is_head, ("model.layers.0.output", "lm_head.dense", "model.head")))
