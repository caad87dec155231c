"""Adapter tensors on their way out: any framework's arrays → host bytes → one safetensors body.

numpy has no bfloat16, so a tensor is bytes with a safetensors dtype name. Nothing is copied that is on the host,
contiguous and of a dtype that adapters are served in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from trainer_client.data.arrays import bfloat16_bits, dtype_name, host_array, is_array, on_host, widened
from trainer_client.data.names import shown
from trainer_client.wire.call import Body
from trainer_client.wire.safetensors_file import DTYPES, HostTensor, body_of, read_container

WEIGHT_FILES = ("adapter_model.safetensors", "adapters.safetensors")
"""The names that PEFT and mlx-lm give the file of weights."""
CONFIG_FILE = "adapter_config.json"


def host_tensor(name: str, tensor: Any) -> HostTensor:
    """Brings a numpy, MLX, torch or any `__array__` array, or a list of numbers, to the host. Must run on the thread
    that made an MLX array. Floats in which no adapter is served become float32; float16 and bfloat16 are served.

    Raises `TypeError` for what is not an array of numbers, and `ValueError` for a value that float32 has not."""
    if hasattr(tensor, "full_tensor"):
        raise TypeError(f"Tensor {name!r} is spread over processes: gather it with full_tensor() in all of them first.")
    try:
        given = on_host(tensor)
        dtype = dtype_name(given)
        if dtype == "bfloat16":
            return HostTensor("BF16", np.asarray(bfloat16_bits(given), order="C"))
        # unlike ascontiguousarray, asarray leaves a scalar a scalar
        array = np.asarray(widened(given) if dtype.startswith("float8") else given, order="C")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Tensor {name!r}, {shown(tensor)}, cannot be read here: {error}") from error
    if dtype.startswith("float8"):
        return HostTensor("F32", _little(array), was=dtype)
    if isinstance(tensor, list | tuple) and array.dtype.kind == "i":
        array = array.astype(np.float64)
    stored = DTYPES.get(array.dtype.name)
    if stored is None and array.dtype.kind != "f":
        raise TypeError(f"Tensor {name!r} has dtype {array.dtype}, which safetensors cannot hold: cast it to float32.")
    return _served(name, HostTensor(stored or "", _little(array)))


def _served(name: str, tensor: HostTensor) -> HostTensor:
    """A float that is wider than any that is served, as float32."""
    array = tensor.array
    if array.dtype.kind != "f" or array.dtype.itemsize <= 4:
        return tensor
    with np.errstate(over="ignore"):
        cast = array.astype("<f4")
    beyond = np.isinf(cast) & np.isfinite(array)
    if beyond.any():
        raise ValueError(f"Tensor {name!r} holds {float(array[beyond][0]):.3g}, which is outside the range of float32.")
    return HostTensor("F32", cast, was=array.dtype.name)


def _little(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


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
    tensors = {name: _served(name, tensor) for name, tensor in tensors.items()}
    return tensors, read_config(config_path) if config_path.is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """The tensors of a file. Raises `OSError` or `ValueError`."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return config


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as adapter_config.json would hold it. Raises `TypeError` for what JSON cannot express."""
    plain: dict[str, Any] = json.loads(json.dumps(config, default=_plain))
    return plain


def safetensors_body(tensors: Mapping[str, HostTensor], config: Mapping[str, Any]) -> Body:
    """One file of all tensors, with the adapter's config as JSON in its metadata under `adapter_config`."""
    return body_of(tensors, {"adapter_config": json.dumps(config, default=_plain)})


def _plain(value: Any) -> Any:
    """What an adapter config as an object may hold beyond JSON: PEFT keeps sets and enums."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if is_array(value):
        return host_array(value).tolist()
    raise TypeError(f"The adapter config holds a {type(value).__name__}, which JSON cannot express: {value!r}.")
