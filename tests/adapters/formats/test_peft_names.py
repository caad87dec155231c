"""Layers that transformers and mlx-lm call or stack differently. That the numbers are right is held by tests/golden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.errors import AdapterDoesNotFit, AdapterUnsupported
from adapters.formats import peft
from adapters.formats.peft_names import exported, names_in
from adapters.formats.read import read_bundle
from adapters.spec import ExpertsShape

SEEING = {"language_model.model.layers.0.mlp.up_proj": (6, 4), "language_model.lm_head": (9, 4)}
STACKS = {"gate_proj": ExpertsShape(6, 4, 3), "up_proj": ExpertsShape(6, 4, 3), "down_proj": ExpertsShape(4, 6, 3)}
MIXTRAL = {f"model.layers.0.block_sparse_moe.switch_mlp.{name}": shape for name, shape in STACKS.items()}
MIXTRAL["model.layers.0.block_sparse_moe.gate"] = (3, 4)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def random(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def stacked(rank: int = 2) -> dict[str, np.ndarray]:
    """Both parameters of the block, as PEFT nests them: the first one's tensors hang deeper."""
    return random(
        **{
            f"{EXPERTS}.base_layer.lora_A.weight": (3 * rank, 4),
            f"{EXPERTS}.base_layer.lora_B.weight": (12, 3 * rank),
            f"{EXPERTS}.lora_A.weight": (3 * rank, 6),
            f"{EXPERTS}.lora_B.weight": (4, 3 * rank),
        }
    )


def each(experts: int = 3) -> dict[str, np.ndarray]:
    path = "base_model.model.model.layers.0.block_sparse_moe.experts"
    shapes = {f"{path}.{expert}.w2": (4, 6) for expert in range(experts)}
    halves = {f"{name}.lora_A.weight": (2, width) for name, (_, width) in shapes.items()}
    return random(**halves, **{f"{name}.lora_B.weight": (out, 2) for name, (out, _) in shapes.items()})


def both(**changed: Any) -> dict[str, Any]:
    return {**CONFIG, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"], **changed}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("head", ["lm_head", "language_model.lm_head"])
def test_a_text_model_inside_one_that_sees(prefix: str, head: str) -> None:
    shapes = {f"{prefix}layers.0.mlp.up_proj": (6, 4), head: (9, 4)}
    halves = {f"{name}.lora_A.weight": (2, width) for name, (_, width) in shapes.items()}
    tensors = random(**halves, **{f"{name}.lora_B.weight": (out, 2) for name, (out, _) in shapes.items()})
    bundle = read_bundle(save(tensors), {**CONFIG, "target_modules": ["up_proj", "lm_head"]}, layers=SEEING)
    assert set(bundle.spec.modules) == set(SEEING)
    written, config = peft.write(bundle)
    assert set(config["target_modules"]) == {"model.language_model.layers.0.mlp.up_proj", "lm_head"}
    assert read_bundle(written, config, layers=SEEING).digest == bundle.digest


def test_parameters_of_experts_are_cut_as_peft_joins_them() -> None:
    tensors = stacked()
    bundle = read_bundle(save(tensors), both(), layers=MIXTRAL)
    path = "model.layers.0.block_sparse_moe.switch_mlp"
    assert set(bundle.spec.modules) == {f"{path}.{name}" for name in STACKS}
    a, b = tensors[f"{EXPERTS}.base_layer.lora_A.weight"], tensors[f"{EXPERTS}.base_layer.lora_B.weight"]
    # The definition: PEFT's einsum over A [experts, rank, in] and B [out, rank, experts].
    delta = np.einsum("ore,eri->eoi", b.reshape(12, 2, 3), a.reshape(3, 2, 4))
    for name, part in (("gate_proj", delta[:, :6]), ("up_proj", delta[:, 6:])):
        ours = bundle.tensors[f"{path}.{name}.lora_B"].array @ bundle.tensors[f"{path}.{name}.lora_A"].array
        np.testing.assert_allclose(ours, part, rtol=1e-5, atol=1e-6)
    # Nesting decides which is which: alone, a parameter's tensors hang on the module itself.
    alone = {name: value for name, value in tensors.items() if "base_layer" not in name}
    single = read_bundle(save(alone), both(target_parameters=["experts.down_proj"]), layers=MIXTRAL)
    assert set(single.spec.modules) == {f"{path}.down_proj"}


def test_what_does_not_fit_is_named() -> None:
    tensors = stacked()
    tensors.pop(f"{EXPERTS}.lora_B.weight")
    tensors[f"{EXPERTS}.base_layer.lora_A.weight"] = np.zeros((5, 4), np.float32)
    with pytest.raises(AdapterDoesNotFit) as caught:
        read_bundle(save(tensors), both(), layers=MIXTRAL)
    faults = " ".join(caught.value.faults)
    assert "experts.lora_B.weight is missing" in faults and "[5, 4] but must be [6, 4]" in faults


def test_experts_adapted_unlike_and_dora_are_refused() -> None:
    with pytest.raises(AdapterUnsupported, match="all be adapted"):
        read_bundle(save(each()), {**CONFIG, "target_modules": ["w2"], "rank_pattern": {"1.w2": 1}}, layers=MIXTRAL)
    with pytest.raises(AdapterDoesNotFit, match=r"experts\.2\.w2\.lora_A\.weight is missing"):
        read_bundle(save(each(2)), {**CONFIG, "target_modules": ["w2"]}, layers=MIXTRAL)
    with pytest.raises(AdapterUnsupported, match="DoRA on stacked experts"):
        read_bundle(save(stacked()), both(use_dora=True), layers=MIXTRAL)
    assert set(read_bundle(save(each()), {**CONFIG, "target_modules": ["w2"]}, layers=MIXTRAL).spec.modules)


def test_a_stack_whose_order_is_not_known_is_not_guessed() -> None:
    """Blocks called `experts` take turns in gpt-oss alone, which a linear router beside them tells."""
    layers = {f"model.layers.0.mlp.experts.{name}": shape for name, shape in STACKS.items()}
    assert names_in(layers, ["model.layers.0.mlp.experts"]).blocks == ()
    (block,) = names_in({**layers, "model.layers.0.mlp.router": (3, 4)}, ["model.layers.0.mlp.experts"]).blocks
    assert block.interleaved
    with pytest.raises(AdapterDoesNotFit, match="unexpected"):
        read_bundle(save(stacked()), both(), layers=layers)
    llama4 = {path.replace(".mlp.", ".feed_forward."): shape for path, shape in layers.items()}
    assert names_in({**llama4, "model.layers.0.feed_forward.router": (3, 4)}, []).blocks == ()


def test_names_that_agree_stay() -> None:
    for path in ("model.layers.0.self_attn.q_proj", "lm_head", "model.layers.3.mlp.gate_up_proj"):
        assert exported(path) == path


@pytest.mark.parametrize("front", ["model.language_model.", "language_model.model.", "model.text_model."])
def test_the_language_half_of_a_vision_model_has_the_names_that_peft_gives_it(front: str) -> None:
    layers = {"language_model.model.layers.0.self_attn.q_proj": (6, 4), "language_model.lm_head": (9, 4)}
    tensors = {
        f"base_model.model.{front}layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 4), np.float32),
        f"base_model.model.{front}layers.0.self_attn.q_proj.lora_B.weight": np.ones((6, 2), np.float32),
    }
    bundle = read_bundle(save(tensors), {**CONFIG, "target_modules": ["q_proj"]}, layers=layers)
    assert set(bundle.spec.modules) == {"language_model.model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize(
    "tower", ["model.visual.blocks.0.attn.q_proj", "vision_tower.encoder.layers.0.self_attn.q_proj"]
)
def test_an_adapter_on_the_tower_is_refused_by_name(tower: str) -> None:
    layers = {"language_model.model.layers.0.self_attn.q_proj": (6, 4)}
    tensors = {
        f"base_model.model.{path}.lora_{half}.weight": np.ones(shape, np.float32)
        for path in (tower, "model.language_model.layers.0.self_attn.q_proj")
        for half, shape in (("A", (2, 4)), ("B", (6, 2)))
    }
    with pytest.raises(AdapterDoesNotFit, match="vision tower are not served") as caught:
        read_bundle(save(tensors), {**CONFIG, "target_modules": ["q_proj"]}, layers=layers)
    assert all(tower in fault for fault in caught.value.faults) and len(caught.value.faults) == 2
