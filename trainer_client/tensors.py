"""Adapter tensors on their way out: any framework's arrays → host bytes → one safetensors body.

numpy has no bfloat16, so a tensor is bytes with a safetensors dtype name. Neither MLX nor torch is imported: an array
of theirs is proof that its module is already loaded. Nothing is copied that is on the host and contiguous.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from trainer_client.body import Body
from trainer_client.container import DTYPES, HostTensor, body_of, read_container

WEIGHT_FILES = ("adapter_model.safetensors", "adapters.safetensors")
"""As PEFT and mlx-lm name them."""
CONFIG_FILE = "adapter_config.json"


def host_tensor(name: str, tensor: Any) -> HostTensor:
    """Brings a numpy, MLX, torch or any `__array__` array to the host. Must run on the thread that made an MLX array.

    Raises `TypeError` for what is not an array of numbers."""
    if hasattr(tensor, "detach"):  # torch refuses to show a tensor that needs a gradient or lives on a device
        tensor = tensor.detach().cpu()
    if _dtype_name(tensor) == "bfloat16":
        return HostTensor("BF16", np.asarray(_bfloat16_bits(tensor), order="C"))
    array = np.asarray(tensor, order="C")  # unlike ascontiguousarray, leaves a scalar a scalar
    dtype = DTYPES.get(array.dtype.name)
    if dtype is None:
        raise TypeError(f"Tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold: cast it to float32.")
    return HostTensor(dtype, array.astype(array.dtype.newbyteorder("<"), copy=False))


def host_tensors(tensors: Mapping[str, Any]) -> dict[str, HostTensor]:
    if not tensors:
        raise ValueError("There are no tensors to push: the mapping is empty.")
    return {name: host_tensor(name, tensor) for name, tensor in tensors.items()}


def read_adapter(directory: Path) -> tuple[dict[str, HostTensor], dict[str, Any] | None]:
    """Tensors and config (None without adapter_config.json) of a directory as PEFT or mlx-lm writes it.

    Raises `FileNotFoundError` or `ValueError` with what is missing or broken."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: give one that holds {CONFIG_FILE} and the weights.")
    found = [directory / name for name in WEIGHT_FILES if (directory / name).is_file()]
    if len(found) != 1:
        what = "both" if found else "neither"
        raise FileNotFoundError(f"{directory} holds {what} of {' and '.join(WEIGHT_FILES)}: exactly one is needed.")
    try:
        tensors, _ = read_container(found[0].read_bytes())
    except ValueError as error:
        raise ValueError(f"{found[0]} is not a readable safetensors file: {error}.") from error
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        return tensors, None
    try:
        config = json.loads(config_path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} must hold a JSON object.")
    return tensors, config


def safetensors_body(tensors: Mapping[str, HostTensor], config: Mapping[str, Any]) -> Body:
    """One file of all tensors, with the adapter's config as JSON in its metadata under `adapter_config`."""
    return body_of(tensors, {"adapter_config": json.dumps(config, default=_plain)})


def _dtype_name(tensor: Any) -> str:
    """`bfloat16` for numpy's, MLX's (`mlx.core.bfloat16`) and torch's (`torch.bfloat16`) alike."""
    return str(getattr(tensor, "dtype", "")).rpartition(".")[2]


def _bfloat16_bits(tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor.view(np.uint16)
    package = type(tensor).__module__.partition(".")[0]
    if package == "mlx":
        bits = tensor.view(sys.modules["mlx.core"].uint16)
    elif hasattr(tensor, "numpy"):
        bits = tensor.contiguous().view(sys.modules["torch"].int16).numpy()
    else:
        bits = np.asarray(tensor)
    return np.asarray(bits).view(np.uint16)


def _plain(value: Any) -> Any:
    """What an adapter config as an object may hold beyond JSON: PEFT keeps sets and enums."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"The adapter config holds a {type(value).__name__}, which JSON cannot express: {value!r}.")
