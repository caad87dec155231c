"""The vision half of a checkpoint: every tensor of it is read, or the start says why not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from rollout_server.engine.model.checkpoint.files import read_config
from rollout_server.engine.model.load import read_model
from rollout_server.engine.model.vision.load import nbytes, read_vision
from rollout_server.errors import EngineUnavailable
from tests.support.golden_vision import copied
from tests.support.tiny_models import build

PACKED = ("weight", "scales", "biases")


def changed(directory: Path, **tensors: np.ndarray | None) -> None:
    """Tensors put in, or taken away."""
    path = directory / "model.safetensors"
    there = load_file(path) | {name: value for name, value in tensors.items() if value is not None}
    save_file({name: value for name, value in there.items() if tensors.get(name, 0) is not None}, path)


def test_a_tower_is_read_whole(tmp_path: Path) -> None:
    copied("qwen2_5_vl", tmp_path)
    vision = read_vision(tmp_path, read_config(tmp_path))
    assert vision is not None
    held = load_file(tmp_path / "model.safetensors")
    assert nbytes(vision) == sum(array.nbytes for name, array in held.items() if name.startswith("visual."))


@pytest.mark.parametrize("tensor", ["visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.2.bias"])
def test_a_tensor_that_is_missing_is_named(tensor: str, tmp_path: Path) -> None:
    changed(copied("qwen2_5_vl", tmp_path), **{tensor: None})
    with pytest.raises(EngineUnavailable, match=tensor.removeprefix("visual.")):
        read_vision(tmp_path, read_config(tmp_path))


def test_a_tensor_that_is_too_many_is_named(tmp_path: Path) -> None:
    changed(copied("qwen3_vl", tmp_path), **{"model.visual.blocks.9.attn.qkv.weight": np.zeros(3, np.float32)})
    with pytest.raises(EngineUnavailable, match=r"vision half .* could not be loaded: .*blocks.9.attn.qkv.weight"):
        read_vision(tmp_path, read_config(tmp_path))


@pytest.mark.parametrize(
    ("family", "field", "value", "said"),
    [
        ("qwen2_vl", "hidden_act", "strangelu", "strangelu"),
        ("qwen2_5_vl", "depth", 2, "blocks.2"),
        ("qwen3_vl", "deepstack_visual_indexes", [0], "deepstack_merger_list.1"),
        ("gemma3", "image_size", 64, "position_embedding"),
        ("idefics3", "image_size", 36, "scale_factor 2 does not divide the 9 patches"),
    ],
)
def test_a_tower_that_its_configuration_does_not_describe_is_refused(
    family: str, field: str, value: Any, said: str, tmp_path: Path
) -> None:
    config = read_config(copied(family, tmp_path))
    config["vision_config"][field] = value
    with pytest.raises(EngineUnavailable, match=said):
        read_vision(tmp_path, config)


def test_a_choice_of_states_that_is_not_known_is_refused(tmp_path: Path) -> None:
    for family, strategy in (("llava", "last"), ("pixtral", "default")):
        path = copied(family, tmp_path / family, vision_feature_select_strategy=strategy)
        with pytest.raises(EngineUnavailable, match=f"vision_feature_select_strategy.*{strategy}"):
            read_vision(path, read_config(path))


def test_packed_layers_of_a_tower_are_unpacked(tmp_path: Path) -> None:
    path = copied("mistral3", tmp_path, quantization={"group_size": 32, "bits": 8})
    tensors = load_file(path / "model.safetensors")
    packed, name = {}, "multi_modal_projector.linear_2"
    for part, array in zip(PACKED, mx.quantize(mx.array(tensors[f"{name}.weight"]), 32, 8), strict=True):
        packed[f"{name}.{part}"] = np.array(array)
    changed(path, **packed)
    vision = read_vision(path, read_config(path))
    assert vision is not None
    ours = np.array(vision.tower.multi_modal_projector.linear_2.weight)
    step = np.abs(packed[f"{name}.scales"]).max()
    assert 0 < np.abs(ours - tensors[f"{name}.weight"]).max() <= step


def nested(name: str) -> str:
    """As releases of transformers between the published files and today's have named a tensor."""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.").replace("model.", "model.language_model.", 1)
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return name if name.startswith("lm_head.") else f"model.{name}"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3", "llava", "pixtral", "mistral3"])
def test_nested_names_are_the_same_model(family: str, tmp_path: Path) -> None:
    plain, other = (copied(family, tmp_path / name) for name in ("plain", "nested"))
    tensors = load_file(plain / "model.safetensors")
    save_file({nested(name): value for name, value in tensors.items()}, other / "model.safetensors")
    found = []
    for path in (plain, other):
        vision = read_vision(path, read_config(path))
        assert vision is not None
        found.append([dict(tree_flatten(part.parameters())) for part in (read_model(path).module, vision.tower)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_models_without_a_tower_that_is_known_are_text_models_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_vision(tmp_path, read_config(build("qwen2", tmp_path / "text"))) is None
    assert not caplog.records
    path = copied("qwen2_vl", tmp_path / "seeing")
    with caplog.at_level(logging.WARNING, "rollout_server.engine.model"):
        assert read_vision(path, read_config(path) | {"model_type": "kimi_vl"}) is None
        assert "served as a text model and refuses pictures" in caplog.messages[-1]
        other = {"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}
        assert read_vision(path, read_config(path) | other) is None
        assert "served as a text model and refuses pictures" in caplog.messages[-1]
        tower = {name: None for name in load_file(path / "model.safetensors") if name.startswith("visual.")}
        changed(path, **tower)
        assert read_vision(path, read_config(path)) is None
        assert "no tensors of a vision tower" in caplog.messages[-1]
    assert read_model(path).module is not None
