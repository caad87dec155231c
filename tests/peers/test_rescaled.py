"""Peft models whose layers act otherwise than their configuration says: pushed as they act, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from tests.peers.conftest import Peer
from tests.support.peers import reference
from trainer_client.adapter.sources import adapter_of

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 2, r"layers\.0\..*": 5}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "whole head": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
}


def layers(model: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def rescale(model: torch.nn.Module) -> None:
    """Every other layer by a factor of its own; one to nothing."""
    for number, (_, layer) in enumerate(layers(model)):
        if number == 2:
            layer.scale_layer(0)
        elif number % 2 == 0:
            layer.set_scale("default", 0.3 + number)


@pytest.mark.parametrize("peer", ["llama"], indirect=True, scope="module")
@pytest.mark.parametrize("kind", list(KINDS))
def test_layers_that_were_rescaled_are_served_as_torch_computes_them(peer: Peer, kind: str) -> None:
    model = reference.adapted(peer.directory, **{"r": 4, "lora_alpha": 7, **KINDS[kind]})
    policy = kind.replace(" ", "-")
    before = peer.client.push(policy, model)
    rescale(model)
    after = peer.client.push(policy, model)
    assert after.verified and not after.unchanged and after.digest != before.digest
    peer.hold(model, policy, "rescaled")


@pytest.mark.parametrize("peer", ["llama"], indirect=True, scope="module")
def test_a_model_in_its_wrappers_and_one_of_several_adapters(peer: Peer) -> None:
    model = reference.adapted(peer.directory, r=4, lora_alpha=7)
    plain = peer.client.push("wrapped", model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with rescale_adapter_scale(model, 3.0):
        peer.client.push("wrapped", model)
        peer.hold(model, "wrapped", "rescaled")
    compiled = torch.compile(model)
    assert peer.client.push("wrapped", compiled).digest == plain.digest
    model.base_model.model = torch.compile(model.base_model.model)
    assert peer.client.push("wrapped", model).digest == plain.digest
    state = {f"module.{name}": value for name, value in peft.get_peft_model_state_dict(model).items()}
    assert any("_orig_mod" in name for name in state)
    assert peer.client.push("wrapped", state, model.peft_config["default"]).digest == plain.digest


@pytest.mark.parametrize("peer", ["llama"], indirect=True, scope="module")
def test_a_merged_adapter_is_what_it_was(peer: Peer) -> None:
    model = reference.adapted(peer.directory, r=4, lora_alpha=7)
    model.merge_adapter()
    peer.client.push("merged", model)
    peer.hold(model, "merged", "rescaled")


@pytest.mark.parametrize("peer", ["qwen2_moe"], indirect=True, scope="module")
def test_rescaled_parameters_of_experts(peer: Peer) -> None:
    fields = {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = reference.adapted(peer.directory, r=3, lora_alpha=5, **fields)
    for number, (_, layer) in enumerate(layers(model)):
        layer.set_scale("default", 0.5 + number)
    peer.client.push("experts", model)
    peer.hold(model, "experts", "rescaled")


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge_another(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    next(layers(model))[1].merge(adapter_names=["other"])


def activate_another_in_one_layer(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    next(layers(model))[1].set_adapter("other")


def activate_two_in_one_layer(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    next(layers(model))[1].set_adapter(["default", "other"])


def spoil(model: Any) -> None:
    next(layers(model))[1].scaling["default"] = float("nan")


@pytest.mark.parametrize("peer", ["llama"], indirect=True, scope="module")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (disable, "is disabled in"),
        (merge_another, r"\['other'\] merged into its weights"),
        (activate_another_in_one_layer, r"computes with the adapters \['other'\]"),
        (activate_two_in_one_layer, r"computes with the adapters \['default', 'other'\]"),
        (spoil, "is nan"),
    ],
)
def test_what_cannot_be_pushed_as_it_acts_is_refused_with_the_layers_name(
    peer: Peer, change: Callable[[Any], None], sentence: str
) -> None:
    model = reference.adapted(peer.directory, r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    change(model)
    with pytest.raises(ValueError, match=sentence) as caught:
        adapter_of(model)
    assert ".layers.0." in str(caught.value)
