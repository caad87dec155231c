"""What `push` takes → named tensors in host memory and the one config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from trainer_client.adapter.mlx_layers import layers_adapter
from trainer_client.adapter.peft_models import bare_model, peft_adapter
from trainer_client.adapter.tensors import host_tensors, plain_config, read_adapter, read_config
from trainer_client.adapter.wrappers import unwrapped, unwrapped_config
from trainer_client.wire.safetensors_file import HostTensor

CALLERS = 5
"""Frames from where the warning is made to the line that calls a client's `push`."""


def adapter_of(source: Any, config: Any = None) -> tuple[dict[str, HostTensor], Mapping[str, Any]]:
    """Raises `TypeError` for what is no adapter, and `ValueError` where the config is missing or there are two. Warns
    where tensors were cast, since no adapter is served in what they were."""
    own: Mapping[str, Any] | None = None
    source = bare_model(source)
    if isinstance(source, str | PathLike):
        host, own = read_adapter(Path(source))
    elif hasattr(source, "peft_config"):
        tensors, own = peft_adapter(source)
        host = host_tensors(tensors)
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
    _tell_casts(host)
    return unwrapped(host), unwrapped_config(plain_config(_fields(config)))


def _fields(config: Any) -> Mapping[str, Any]:
    """What adapter_config.json would hold: of a mapping, PEFT's own object, the arguments of a run, or the file."""
    if isinstance(config, Mapping):
        only = next(iter(config.values())) if len(config) == 1 else None
        return _fields(only) if hasattr(only, "to_dict") else config  # `model.peft_config` holds one by its name
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if isinstance(config, str | PathLike):
        return read_config(Path(config))
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return vars(config)
    raise TypeError(f"The config is what adapter_config.json holds, or a LoraConfig, not {type(config).__name__}.")


def _tell_casts(host: Mapping[str, HostTensor]) -> None:
    cast = {name: tensor.was for name, tensor in host.items() if tensor.was is not None}
    if cast:
        first, dtypes = next(iter(cast)), " and ".join(sorted(set(cast.values())))
        are = "is" if len(cast) == 1 else "are"
        warnings.warn(
            f"{len(cast)} of {len(host)} tensors {are} {dtypes}, in which no adapter is served, and sent as float32; "
            f"the first is {first!r}.",
            stacklevel=CALLERS,
        )
