"""What a person reads of a file that is wrong hundreds of times in the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.errors import AdapterDoesNotFit, AdapterUnreadable, AdapterUnsupported
from adapters.formats.read import read_bundle
from tests.support.tiny_models import random_adapter

LAYERS = {f"model.layers.{layer}.self_attn.{part}_proj": (8, 6) for layer in range(56) for part in "qkvo"}
FRONT = "base_model.model."


def told(change: Callable[[str, np.ndarray], tuple[str, np.ndarray]], **fields: Any) -> AdapterDoesNotFit:
    """What is said of an adapter on 224 layers of which every tensor was changed."""
    tensors, config = random_adapter(LAYERS, 2, 0)
    with pytest.raises(AdapterDoesNotFit) as caught:
        read_bundle(save(dict(change(*item) for item in tensors.items())), config | fields, layers=LAYERS)
    return caught.value


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name, a: (name, a.astype(np.float64)), "448 tensors have dtype F64; F32, F16, BF16 are served: "),
        (lambda name, a: (name, a.astype(np.int8)), "448 tensors have dtype I8; "),
        (lambda name, a: (name, a * np.nan), "448 tensors hold values that are not finite (NaN or infinity): "),
        (lambda name, a: (name, np.ascontiguousarray(a.T)), "448 tensors have shapes that do not fit (they look tr"),
        (lambda name, a: (name, a[:, :1]), "tensors have shapes that do not fit: "),
        (lambda name, a: ("actor." + name.removeprefix(FRONT), a), "448 tensors have the prefix 'actor.' in front of "),
        (lambda name, a: ("actor." + name, a), "448 tensors have the prefix 'actor.' in front of "),
        (lambda name, a: (name.replace("layers.", "layers.9"), a), "224 layers are targeted by the configuration, "),
        (lambda name, a: (name.replace("lora_", "vera_"), a), "448 tensors are unexpected, since each is no lora_"),
    ],
)  # fmt: skip
def test_a_kind_of_fault_is_one_sentence_with_a_count(change: Any, sentence: str) -> None:
    error = told(change)
    assert sentence in error.message and len(error.message) < 1024
    assert "and 445 more" in error.message or "and 221 more" in error.message
    assert len(error.faults) >= 224 and all(len(fault) < 200 for fault in error.faults)


def test_two_faults_are_told_by_their_own_sentences() -> None:
    tensors, config = random_adapter(LAYERS, 2, 0)
    names = sorted(tensors)[:2]
    tensors |= {name: tensors[name].astype(np.float64) for name in names}
    with pytest.raises(AdapterDoesNotFit) as caught:
        read_bundle(save(tensors), config, layers=LAYERS)
    assert caught.value.message.endswith(" ".join(caught.value.faults))


def test_many_kinds_are_bounded_too() -> None:
    names = [f"stray.{kind}" for kind in range(40)]
    error = AdapterDoesNotFit([f"{name} is wrong in a way of its own." for name in names])
    assert error.message.endswith("30 more faults are of other kinds.") and len(error.faults) == 40


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: name.replace(FRONT, FRONT + "_orig_mod."),
        lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
        lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        lambda name: name.replace(".lora_", "._orig_mod.lora_"),
    ],
)
def test_what_torch_wraps_a_model_in_is_no_part_of_its_layers_names(wrap: Callable[[str], str]) -> None:
    tensors, config = random_adapter(LAYERS, 2, 0)
    plain = read_bundle(save(tensors), config, layers=LAYERS)
    wrapped = {wrap(name): array for name, array in tensors.items()}
    assert read_bundle(save(wrapped), config, layers=LAYERS).digest == plain.digest


def test_patterns_name_wrapped_layers_too() -> None:
    tensors, config = random_adapter(LAYERS, 2, 0)
    layer = next(iter(LAYERS))
    plain = read_bundle(save(tensors), config | {"alpha_pattern": {layer: 9}}, layers=LAYERS)
    for key in (f"_orig_mod.{layer}", rf"^_orig_mod\.{layer}", layer.replace("model.", "model._fsdp_wrapped_module.")):
        fields = {"alpha_pattern": {key: 9}, "target_modules": [f"_orig_mod.{name}" for name in LAYERS]}
        assert read_bundle(save(tensors), config | fields, layers=LAYERS).digest == plain.digest


def test_a_tensor_that_is_there_wrapped_and_bare_is_refused() -> None:
    tensors, config = random_adapter(LAYERS, 2, 0)
    name = next(iter(tensors))
    with pytest.raises(AdapterDoesNotFit, match="_orig_mod"):
        read_bundle(save(tensors | {f"_orig_mod.{name}": tensors[name]}), config, layers=LAYERS)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"r": "4"}, "not '4'."),
        ({"r": None}, "not null."),
        ({"r": True}, "not true."),
        ({"lora_alpha": "16"}, "not '16'."),
        ({"rank_pattern": {"q_proj": "8"}}, "not '8'."),
        ({"use_dora": "true"}, "not 'true'."),
        ({"layers_to_transform": ["1", None]}, "not ['1', null]."),
        ({"target_modules": [1, "q"]}, "not [1, 'q']."),
        ({"r": [[[]]]}, "not [[[]]]."),
        ({"r": "4\n" * 500}, "…"),
    ],
)
def test_text_is_shown_as_text(fields: dict[str, Any], sentence: str) -> None:
    tensors, config = random_adapter(LAYERS, 2, 0)
    with pytest.raises(AdapterUnreadable) as caught:
        read_bundle(save(tensors), config | fields, layers=LAYERS)
    assert sentence in caught.value.message and len(caught.value.message) < 400 and caught.value.message.isprintable()


@pytest.mark.parametrize("fields", [{"kind": "delta"}, {"peft_type": "LORA"}, {}])
def test_hundreds_of_unknown_fields_are_one_sentence(fields: dict[str, Any]) -> None:
    tensors, config = random_adapter(LAYERS, 2, 0)
    strange = {f"strange_{number}": "1" for number in range(300)}
    base = fields if "kind" in fields else config
    if not fields:
        base = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0} | strange}
        strange = {}
    with pytest.raises(AdapterUnsupported) as caught:
        read_bundle(save(tensors), base | strange, layers=LAYERS)
    assert len(caught.value.fields) == 300 and "and 295 more" in caught.value.message
    assert len(caught.value.message) < 500
