"""What `push` takes → named tensors in host memory and the one config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from trainer_client.container import HostTensor
from trainer_client.lora_layers import layers_adapter
from trainer_client.tensors import host_tensors, read_adapter


def adapter_of(source: Any, config: Mapping[str, Any] | None) -> tuple[dict[str, HostTensor], Mapping[str, Any]]:
    """Raises `TypeError` for what is no adapter, and `ValueError` where the config is missing or there are two."""
    own: Mapping[str, Any] | None = None
    if isinstance(source, str | PathLike):
        host, own = read_adapter(Path(source))
    elif hasattr(source, "peft_config"):
        host, own = peft_adapter(source)
    elif hasattr(source, "trainable_parameters") and hasattr(source, "named_modules"):
        # before the mappings: a module of MLX is a dict of its children
        tensors, own = layers_adapter(source)
        host = host_tensors(tensors)
    elif isinstance(source, Mapping):
        host = host_tensors(source)
    else:
        raise TypeError(
            "push takes named tensors, a directory, a peft model or an MLX model with LoRA layers, "
            f"not {type(source).__name__}."
        )
    if config is not None and own is not None:
        raise ValueError("This adapter brings its own config: leave out the argument config.")
    config = own if config is None else config
    if config is None:
        raise ValueError("The config is missing: give what adapter_config.json holds, with rank and alpha or scale.")
    return host, config


def peft_adapter(model: Any) -> tuple[dict[str, HostTensor], dict[str, Any]]:
    """Tensors and config of the active adapter of a peft model, or of a transformers model with one, as PEFT saves
    them. Raises `ValueError` unless exactly one adapter is active."""
    active = model.active_adapters
    names = list(active() if callable(active) else active)  # a method in transformers, a property in peft
    if len(names) != 1:
        raise ValueError(f"The model has {len(names)} active adapters ({names}): activate one with set_adapter.")
    # Left to itself, PEFT would add the base's own embedding table where that is a target, and ask the Hub about it.
    state = sys.modules["peft"].get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    return host_tensors(state), model.peft_config[names[0]].to_dict()
