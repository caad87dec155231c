"""Adapters read off mlx-lm's layers, and what cannot be said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from trainer_client import adapter_digest
from trainer_client.adapter.mlx_layers import layers_adapter
from trainer_client.adapter.sources import adapter_of
from trainer_client.adapter.tensors import host_tensors, read_adapter


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 4)
        self.k = nn.Linear(6, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.layers = [Block(), Block()]
        self.freeze()


def wear(model: Model, layer: Any = LoRALinear, **options: Any) -> Model:
    for block in model.layers:
        block.q = layer.from_base(block.q, r=2, scale=3.0, **options)
        block.k = layer.from_base(block.k, r=2, scale=3.0, **options)
    return model


@pytest.mark.parametrize("layer", [LoRALinear, DoRALinear])
def test_even_layers_are_written_as_mlx_lm_saves_them(layer: Any, tmp_path: Path) -> None:
    model = wear(Model(), layer)
    kind = "dora" if layer is DoRALinear else "lora"
    saved = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    expected, expected_config = read_adapter(tmp_path)
    host, config = adapter_of(model, None)
    assert host.keys() == expected.keys()
    assert all(host[name].array.tobytes() == expected[name].array.tobytes() for name in expected)
    assert expected_config is not None
    assert adapter_digest(host, config) == adapter_digest(expected, expected_config)
    assert config["lora_parameters"]["keys"] == ["layers.0.k", "layers.0.q", "layers.1.k", "layers.1.q"]


def test_uneven_layers_are_written_with_pefts_patterns() -> None:
    model = wear(Model())
    model.layers[1].q = LoRALinear.from_base(nn.Linear(6, 4), r=3, scale=0.5)
    model.layers[1].q.linear.freeze()
    model.layers[0].k.scale = 0.1
    tensors, config = layers_adapter(model)
    assert (config["r"], config["lora_alpha"]) == (2, 6.0)
    assert config["rank_pattern"] == {r"^layers\.1\.q": 3}
    assert config["alpha_pattern"] == {r"^layers\.0\.k": 0.2, r"^layers\.1\.q": 1.5}
    assert tensors["base_model.model.layers.1.q.lora_A.weight"].shape == (3, 6)
    np.testing.assert_array_equal(
        np.array(tensors["base_model.model.layers.0.k.lora_A.weight"]), np.array(model.layers[0].k.lora_a).T
    )
    assert adapter_digest(host_tensors(tensors), config) is not None


def test_bfloat16_layers_keep_their_bits() -> None:
    model = wear(Model())
    model.set_dtype(mx.bfloat16)
    assert {tensor.dtype for tensor in adapter_of(model, None)[0].values()} == {"BF16"}


def test_what_would_be_left_behind_is_refused_by_name() -> None:
    model = wear(Model())
    model.layers[0].q.linear.unfreeze()
    with pytest.raises(ValueError, match=r"layers\.0\.q\.linear\.bias, layers\.0\.q\.linear\.weight\. Such weights"):
        layers_adapter(model)
    model.unfreeze()
    with pytest.raises(ValueError, match="and 4 more"):
        layers_adapter(model)


def test_what_no_format_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match="no LoRA or DoRA layers"):
        adapter_of(Model(), None)
    mixed = wear(Model())
    mixed.layers[0].q = DoRALinear.from_base(mixed.layers[0].q.linear, r=2, scale=3.0)
    with pytest.raises(ValueError, match="mixes LoRA and DoRA"):
        layers_adapter(mixed)
    uneven = wear(Model())
    uneven.table = LoRAEmbedding.from_base(uneven.table, r=1, scale=1.0)
    with pytest.raises(ValueError, match="table is a LoRAEmbedding"):
        layers_adapter(uneven)

    class Other(nn.Module):
        lora_a = mx.zeros((2, 2))

    strange = wear(Model())
    strange.layers[0].q = Other()
    with pytest.raises(ValueError, match=r"layers\.0\.q is a Other"):
        layers_adapter(strange)
    with pytest.raises(ValueError, match="brings its own config"):
        adapter_of(wear(Model()), {"r": 2})
