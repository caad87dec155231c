"""Any framework's array → numpy, on the host. Neither MLX nor torch is imported: an array of theirs is proof that its
module is already loaded."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_array(value: object) -> bool:
    """Returns whether it is an array of numpy (or its scalar), torch, MLX, JAX, or anything else that numpy can
    read."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__") or _is_mlx(value)


def host_array(value: Any) -> NDArray[Any]:
    """`value` as numpy, whatever device it is on and whether it needs a gradient; lists too. What numpy has no dtype
    for is widened to float32, which holds it exactly."""
    value = on_host(value)
    name = dtype_name(value)
    if name == "bfloat16":
        return (bfloat16_bits(value).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(widened(value) if name.startswith("float8") else value)


def on_host(value: Any) -> Any:
    """torch refuses to show a tensor that needs a gradient or lives on a device; also one of a list."""
    if isinstance(value, list | tuple):
        return [host_array(item) if hasattr(item, "detach") else item for item in value]
    return value.detach().cpu() if hasattr(value, "detach") else value


def widened(value: Any) -> Any:
    """An array of eight-bit floats as float32, exactly."""
    if hasattr(value, "detach"):
        return value.to(sys.modules["torch"].float32)
    return value.astype(np.float32)


def dtype_name(value: Any) -> str:
    """`bfloat16` for numpy's, MLX's (`mlx.core.bfloat16`) and torch's (`torch.bfloat16`) alike."""
    return str(getattr(value, "dtype", "")).rpartition(".")[2]


def bfloat16_bits(value: Any) -> NDArray[np.uint16]:
    """The bits of an array on the host, without a copy."""
    if isinstance(value, np.ndarray):
        return value.view(np.uint16)
    if _is_mlx(value):
        bits = value.view(sys.modules["mlx.core"].uint16)
    elif hasattr(value, "numpy"):
        bits = value.contiguous().view(sys.modules["torch"].int16).numpy()
    else:
        bits = np.asarray(value)
    return np.asarray(bits).view(np.uint16)


def _is_mlx(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "mlx" and hasattr(value, "tolist")
