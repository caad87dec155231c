"""Layouts of published weights become those that the family's class reads, or are refused: a few numbers each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.model.checkpoint.stacked import LAYOUTS, folded_factors


def numbers(*shape: int) -> mx.array:
    size = 1
    for side in shape:
        size *= side
    return mx.arange(size, dtype=mx.float32).reshape(shape)


def told(family: str, weights: dict[str, mx.array], **args: Any) -> dict[str, Any]:
    """By name, what the class is told."""
    return {name: value.tolist() for name, value in LAYOUTS[family](weights, SimpleNamespace(**args)).items()}


def test_gates_and_ups_of_gpt_oss_stand_in_turn_and_each_expert_is_turned() -> None:
    layer = "model.layers.0.mlp.experts"
    stacked = numbers(2, 3, 4)  # [experts, in, gate and up in turn]
    found = told(
        "gpt_oss",
        {f"{layer}.gate_up_proj": stacked, f"{layer}.gate_up_proj_bias": numbers(2, 4), "norm": numbers(1)}
        | {f"{layer}.down_proj": numbers(2, 2, 3), f"{layer}.down_proj_bias": numbers(2, 3)},
    )
    of_expert_0 = [[0, 4, 8], [2, 6, 10]]  # [out, in] of columns 0 and 2
    assert found[f"{layer}.gate_proj.weight"][0] == of_expert_0
    assert found[f"{layer}.up_proj.weight"][0] == [[1, 5, 9], [3, 7, 11]]
    assert found[f"{layer}.gate_proj.bias"] == [[0, 2], [4, 6]] and found[f"{layer}.up_proj.bias"] == [[1, 3], [5, 7]]
    assert found[f"{layer}.down_proj.weight"][0] == [[0, 3], [1, 4], [2, 5]]
    assert found[f"{layer}.down_proj.bias"] == numbers(2, 3).tolist() and found["norm"] == [0]
    packed = {f"{layer}.gate_up_proj_blocks": numbers(1), f"{layer}.down_proj": numbers(1, 1, 2)}
    assert told("gpt_oss", packed).keys() == packed.keys(), "packed experts are left as they are"


def test_files_of_gpt2_have_the_trunk_s_name_or_not() -> None:
    assert told("gpt2", {"transformer.h.0.ln": numbers(1), "wte": numbers(1)}).keys() == {"h.0.ln", "wte"}


def test_a_bias_of_ernie_s_router_is_refused_unless_it_is_zero() -> None:
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    assert told("ernie4_5_moe", {name: mx.zeros((1, 4))}).keys() == {name}
    with pytest.raises(ValueError, match="is not zero"):
        told("ernie4_5_moe", {name: mx.array([[0.0, 0.0, -1e-6, 0.0]])})


CONVOLUTION = "model.layers.0.mamba.conv1d.weight"
# As transformers writes it, [channels, 1, width]; and as mlx-lm converts it, [channels, width, 1].
WRITTEN, CONVERTED = {CONVOLUTION: numbers(2, 1, 4)}, {CONVOLUTION: numbers(2, 4, 1)}
PLAIN = {"mamba_rms_norm": False, "mamba_n_groups": 1, "key_multiplier": 1.0, "attention_in_multiplier": 1.0}


def test_keys_and_values_of_falcon_h1_have_their_factors() -> None:
    weights = {f"layers.0.self_attn.{each}_proj.weight": mx.ones((1, 1)) for each in "qkv"}
    found = told("falcon_h1", weights | WRITTEN, **(PLAIN | {"key_multiplier": 0.5, "attention_in_multiplier": 3.0}))
    assert [found[f"layers.0.self_attn.{each}_proj.weight"] for each in "qkv"] == [[[1]], [[0.5]], [[3]]]


@pytest.mark.parametrize(
    ("weights", "args", "said"),
    [
        (CONVERTED, {"key_multiplier": 0.5}, "take the files that transformers wrote"),
        (WRITTEN | {"layers.0.k_proj.bias": numbers(1)}, {}, "does not multiply biases"),
        (WRITTEN, {"mamba_rms_norm": True, "mamba_n_groups": 2}, "not that of a group"),
    ],
)
def test_what_falcon_h1_would_compute_otherwise_is_refused(
    weights: dict[str, mx.array], args: dict[str, Any], said: str
) -> None:
    assert told("falcon_h1", CONVERTED, **PLAIN).keys() == CONVERTED.keys()
    with pytest.raises(ValueError, match=said):
        told("falcon_h1", weights, **(PLAIN | args))


def test_decoders_beside_a_tower_are_found_under_the_name_that_their_class_has() -> None:
    gemma = {"model.language_model.norm": numbers(1), "lm_head.weight": numbers(1), "model.vision_tower.x": numbers(1)}
    assert told("gemma3", gemma).keys() == {"language_model.model.norm", "language_model.lm_head.weight"}
    assert told("gemma3", {"language_model.model.norm": numbers(1)}).keys() == {"language_model.model.norm"}
    smol = {"model.text_model.norm": numbers(1), "model.vision_model.x": numbers(1), "model.connector.y": numbers(1)}
    assert told("mistral3", smol).keys() == {"model.norm"}


def test_experts_of_qwen3_vl_are_turned_where_their_width_says_so() -> None:
    name, config = "model.layers.0.mlp.experts.gate_up_proj", {"hidden_size": 3, "moe_intermediate_size": 1}
    published, saved = numbers(1, 3, 2), numbers(1, 2, 3)
    assert told("qwen3_vl_moe", {name: published}, text_config=config)[name] == published.tolist()
    assert told("qwen3_vl_moe", {name: saved}, text_config=config)[name] == [[[0, 3], [1, 4], [2, 5]]]
    with pytest.raises(ValueError, match="may be stored either way"):
        told("qwen3_vl_moe", {name: numbers(1, 4, 4)}, text_config={"hidden_size": 4, "moe_intermediate_size": 2})


def test_factors_that_were_multiplied_in_are_named() -> None:
    def module(family: str, **args: Any) -> Any:
        return SimpleNamespace(model_type=family, args=SimpleNamespace(**args))

    factors = {"key_multiplier": 1.0, "ssm_multipliers": [1.0, 0.5], "lm_head_multiplier": 2.0, "hidden_size": 4}
    said = folded_factors(module("falcon_h1", **factors))
    assert "ssm_multipliers, lm_head_multiplier" in said and "key_multiplier" not in said
    assert not folded_factors(module("falcon_h1", key_multiplier=1.0, mlp_multipliers=(1.0, 1.0)))
    assert not folded_factors(module("qwen3", **factors))
