from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from adapters.errors import AdapterUnreadable, AdapterUnsupported
from adapters.formats import mlx_lm
from adapters.formats.read import read_bundle
from adapters.resident.model_layers import adaptable_layers
from adapters.resident.slots import AdapterSlots
from tests.support.adapter_files import Layers, file_of, logits, make, tokens
from tests.support.numbers.bounds import assert_near
from tests.support.tiny_models import random_adapter


def config_of(num_layers: Any = -1, **parameters: Any) -> dict[str, Any]:
    lora = {"rank": 4, "scale": 2.0, "dropout": 0.0, **parameters}
    return {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": lora}


@pytest.mark.parametrize("num_layers", [-1, 0, 1, 2, 9])
@pytest.mark.parametrize(
    "keys",
    [
        None,
        ["self_attn.q_proj", "mlp.up_proj"],
        ["lm_head"],
        ["lm_head", "self_attn.v_proj"],
        ["model.layers.0.mlp.down_proj"],
        ["self_attn.q_proj", "absent"],
    ],
)
def test_targets_are_those_of_mlx_lm(
    load: Callable[[], nn.Module], layers: Layers, num_layers: int, keys: list[str] | None
) -> None:
    model = load()
    parameters = config_of(num_layers, **({} if keys is None else {"keys": keys}))["lora_parameters"]
    linear_to_lora_layers(model, num_layers, parameters)
    theirs = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    ours = mlx_lm.read({}, config_of(num_layers, keys=keys), layers).spec.modules
    assert set(ours) == theirs


@pytest.mark.parametrize(
    ("config", "field", "sentence"),
    [
        ({"fine_tune_type": "ia3"}, "fine_tune_type", "'ia3' is not known"),
        ({"use_dora": True}, "use_dora", "use_dora is a field of PEFT"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "lora_parameters.alpha", "not read by mlx-lm"),
    ],
)
def test_refusals_name_the_field(layers: Layers, config: dict[str, Any], field: str, sentence: str) -> None:
    with pytest.raises(AdapterUnsupported, match=sentence) as caught:
        mlx_lm.read({}, config_of() | config, layers)
    assert caught.value.fields == (field,)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"lora_parameters": None}, "lora_parameters is missing"),
        ({"lora_parameters": {"scale": 1.0}}, "lora_parameters.rank must be"),
        ({"lora_parameters": {"rank": 2}}, "lora_parameters.scale must be"),
        ({"lora_parameters": {"rank": 2, "scale": float("inf")}}, "lora_parameters.scale must be"),
        ({"lora_parameters": {"rank": 2, "scale": float("nan")}}, "not a finite float32"),
        ({"lora_parameters": {"rank": 2, "scale": 1, "keys": "q_proj"}}, "lora_parameters.keys must be a list"),
        ({"num_layers": None}, "num_layers must be a whole number"),
        ({"num_layers": "all"}, "num_layers must be a whole number"),
    ],
)
def test_unusable_configurations(layers: Layers, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdapterUnreadable, match=sentence):
        mlx_lm.read({}, config_of() | config, layers)


def test_other_fields_of_a_training_run_do_not_matter(layers: Layers) -> None:
    tensors, config = random_adapter(layers, 4, 0, kind="mlx")
    run = {"model": "org/model", "batch_size": 4, "optimizer": "adam", "grad_checkpoint": True, "data": "d", "seed": 3}
    digest = read_bundle(file_of(tensors), config, layers=layers).digest
    assert read_bundle(file_of(tensors), config | run, layers=layers).digest == digest


def test_what_mlx_lm_trains_is_read_and_gives_its_numbers(load: Callable[[], nn.Module], layers: Layers) -> None:
    """Layers made by mlx-lm itself, on the last block only, saved as its trainer saves them."""
    theirs = load()
    config = config_of(1, rank=3, scale=1.25)
    linear_to_lora_layers(theirs, 1, config["lora_parameters"])
    theirs.eval()
    adapters = {name: value for name, value in tree_flatten(theirs.parameters()) if "lora_" in name}
    noisy = {
        n: np.array(v + 0.1 * mx.random.normal(v.shape, key=mx.random.key(i)))
        for i, (n, v) in enumerate(adapters.items())
    }
    theirs.load_weights([(name, mx.array(value)) for name, value in noisy.items()], strict=False)
    model = load()
    slots = AdapterSlots(model, adaptable_layers(model), mx.float32)
    slots.route([slots.stage(read_bundle(file_of(noisy), config, layers=layers))])
    text = tokens(2)
    assert_near(logits(model, text), logits(theirs, text))
    assert np.abs(logits(model, text) - logits(load(), text)).max() > 0.1


@pytest.mark.parametrize("targets", [None, ["lm_head"], ["k_proj", "down_proj"]])
def test_what_is_written_reads_back_and_loads_in_mlx_lm(
    load: Callable[[], nn.Module], layers: Layers, tmp_path: Path, targets: list[str] | None
) -> None:
    bundle = make(layers, 4, targets=targets, scale=1.1)
    weights, config = mlx_lm.write(bundle)
    assert read_bundle(weights, json.loads(json.dumps(config)), layers=layers).digest == bundle.digest
    assert read_bundle(weights, None, layers=layers).digest == bundle.digest
    (tmp_path / "adapters.safetensors").write_bytes(weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    theirs = load_adapters(load(), str(tmp_path))
    theirs.eval()
    model = load()
    slots = AdapterSlots(model, adaptable_layers(model), mx.float32)
    slots.route([slots.stage(bundle)])
    assert_near(logits(model, tokens(2)), logits(theirs, tokens(2)))


def test_what_the_format_cannot_say_is_refused(layers: Layers) -> None:
    tensors, config = random_adapter(layers, 4, 0)
    bundle = read_bundle(file_of(tensors), config | {"alpha_pattern": {"q_proj": 3}}, layers=layers)
    with pytest.raises(AdapterUnsupported, match="one rank and one scale"):
        mlx_lm.write(bundle)
