"""Fields of `LoraConfig` one by one, on one family; and adapters on stacked experts in the forms that PEFT has had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.peers.conftest import Peer
from tests.support.peers import families, reference
from trainer_client.errors import AdapterMismatch, UnsupportedField

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "rank_pattern": {"target_modules": LINEAR, "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2}},
    "alpha_pattern": {"target_modules": LINEAR, "alpha_pattern": {"o_proj": 3, r".*\.0\.mlp\.\w+": 11}},
    "patterns with rslora": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 9},
        "alpha_pattern": {"v_proj": 2, "down_proj": 5},
    },
    "a list": {"target_modules": ["v_proj", "mlp.down_proj"]},
    "an expression": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj|.*gate_proj"},
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": LINEAR, "layers_to_transform": [0], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": LINEAR, "exclude_modules": ["o_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA on embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "use_dora": True},
}
FORMS = {
    "both": ["experts.gate_up_proj", "experts.down_proj"],
    "gate and up": ["experts.gate_up_proj"],
    "down": ["experts.down_proj"],
}


def saved(model: reference.PeftModel, directory: Path) -> Path:
    # The base's own embeddings do not belong to the adapter, though PEFT would add them.
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


@pytest.mark.parametrize("peer", ["llama"], indirect=True, scope="module")
@pytest.mark.parametrize("name", list(OPTIONS))
def test_an_option_means_what_it_means_in_peft(peer: Peer, name: str, tmp_path: Path) -> None:
    model = reference.adapted(peer.directory, **{"r": 4, "lora_alpha": 7, **OPTIONS[name]})
    policy = name.replace(" ", "-")
    peer.client.push(policy, saved(model, tmp_path / "saved"))
    peer.hold(model, policy, "options")
    reference.unpack(peer.export(policy, "peft"), tmp_path / "exported")
    peer.hold(reference.reloaded(peer.directory, tmp_path / "exported"), policy, "options, exported")


WHOLE: dict[str, dict[str, Any]] = {
    "a whole head": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "a whole head with DoRA": {
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["lm_head"],
        "use_dora": True,
    },
    "head and norms": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm", "input_layernorm"]},
}


@pytest.mark.parametrize("peer", ["llama", "qwen3", "granite"], indirect=True, scope="module")
@pytest.mark.parametrize("name", list(WHOLE))
def test_modules_that_were_trained_whole(peer: Peer, name: str, tmp_path: Path) -> None:
    """Beside low-rank parts in their slot, and merged; also of a head that shares the embedding's weight (qwen3)."""
    model = reference.adapted(peer.directory, **{"r": 4, "lora_alpha": 7, **WHOLE[name]})
    policy = name.replace(" ", "-")
    peer.client.push(policy, saved(model, tmp_path / "saved"))
    peer.hold(model, policy, "whole modules")
    peer.client.push(f"{policy}-merged", tmp_path / "saved", mode="merged")
    peer.hold(model, f"{policy}-merged", "whole modules, merged")
    reference.unpack(peer.export(policy, "peft"), tmp_path / "exported")
    peer.hold(reference.reloaded(peer.directory, tmp_path / "exported"), policy, "whole modules, exported")


@pytest.mark.parametrize("peer", ["llama"], indirect=True, scope="module")
def test_fan_in_fan_out_changes_nothing_and_biases_are_refused(peer: Peer, tmp_path: Path) -> None:
    model = reference.adapted(peer.directory, r=4, lora_alpha=7, fan_in_fan_out=True)
    peer.client.push("fan", saved(model, tmp_path / "fan"))
    peer.hold(model, "fan", "options")
    model = reference.adapted(peer.directory, r=4, lora_alpha=7, bias="lora_only")
    with pytest.raises(UnsupportedField, match="bias"):
        peer.client.push("biased", saved(model, tmp_path / "biased"))


@pytest.mark.parametrize("peer", ["qwen2_moe", "gpt_oss", "granitemoe"], indirect=True, scope="module")
@pytest.mark.parametrize("form", list(FORMS))
def test_adapted_parameters_of_experts(peer: Peer, form: str, tmp_path: Path) -> None:
    model = reference.adapted(
        peer.directory, r=3, lora_alpha=5, target_modules=["v_proj"], target_parameters=FORMS[form]
    )
    policy = form.replace(" ", "-")
    peer.client.push(policy, saved(model, tmp_path / "saved"))
    peer.hold(model, policy, "experts")


@pytest.mark.parametrize("peer", ["qwen3_moe", "mixtral"], indirect=True, scope="module")
def test_experts_that_were_modules_of_their_own(peer: Peer, tmp_path: Path) -> None:
    """As releases of transformers before 5 had them: PEFT converts such a file when it loads it, and so do we."""
    directory = each_expert(peer.family, tmp_path / "old")
    peer.client.push("old", directory)
    peer.hold(reference.reloaded(peer.directory, directory), "old", "experts")
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if ".experts.2." in name))
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match=r"experts\.2\..* is missing"):
        peer.client.push("old", directory)


def each_expert(family: str, directory: Path) -> Path:
    block, (gate, up, down) = {
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    }[family]
    config = families.FAMILIES[family].config
    hidden, inner = families.SHARED["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])
    generator = np.random.default_rng(9)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(2):
        for expert in range(4):
            for name, out, width in ((gate, inner, hidden), (up, inner, hidden), (down, hidden, inner)):
                path = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = generator.normal(0, width**-0.5, (3, width)).astype(np.float32)
                tensors[f"{path}.lora_B.weight"] = generator.normal(0, 0.2, (out, 3)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 5,
        "target_modules": [gate, up, down],
    }
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
