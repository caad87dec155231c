"""Adapters that lie in a directory of this machine."""

from __future__ import annotations

import json
from pathlib import Path

from adapters.errors import AdapterError
from adapters.formats.read import read_bundle
from adapters.prepare import PreparedBundle, prepare
from rollout_server.adapter_errors import from_adapters
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.errors import AdapterInvalid

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapters.safetensors")


def read_adapter_directory(directory: Path, info: ModelInfo) -> PreparedBundle:
    """The adapter that PEFT or mlx-lm saved there, ready for the model. Raises `AdapterInvalid` and its kin."""
    weights = next((path for name in WEIGHT_NAMES if (path := directory / name).is_file()), None)
    if weights is None:
        raise AdapterInvalid(f"{directory} holds neither {' nor '.join(WEIGHT_NAMES)}.", param="adapter")
    config_path = directory / CONFIG_NAME
    try:
        config = json.loads(config_path.read_bytes()) if config_path.is_file() else None
        bundle = read_bundle(
            weights.read_bytes(), config, layers=info.layers, parameters=info.weights, scoring=info.scoring
        )
        return prepare(bundle, info.dtype, parameters=info.weights)
    except AdapterError as error:
        raise from_adapters(error) from error
    except (OSError, ValueError) as error:
        raise AdapterInvalid(f"{directory} cannot be read: {error}", param="adapter") from error
