"""What can be done for a version before the engine's thread takes it: scale folded in, turned and cast, on the host.

Numpy only, so that it can run on any thread; staging then only copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.bundle import AdapterBundle
from adapters.spec import AdapterDoesNotFit
from adapters.tensors import AdapterTensor

LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}
"""Finite value of each dtype that a model's activations may have."""


@dataclass(frozen=True, slots=True)
class HostFactors:
    """Of one layer, in the model's dtype; bfloat16 as its bits, uint16."""

    a: NDArray[Any]
    """[rank, in], or [experts, rank, in]."""
    b: NDArray[Any]
    """[rank, out] or [experts, rank, out], scale folded in."""


@dataclass(frozen=True, slots=True)
class PreparedBundle:
    bundle: AdapterBundle
    dtype: str
    """`float32`, `float16` or `bfloat16`, as mlx calls it."""
    factors: Mapping[str, HostFactors]
    """By the layer's path."""


def prepare(bundle: AdapterBundle, dtype: str) -> PreparedBundle:
    """Raises `AdapterDoesNotFit` where a value leaves the range of `dtype`, that of the model's activations."""
    faults = [
        f"{path}: {measure.largest:.3g} is outside the range of {dtype}, the dtype of the model."
        for path, measure in bundle.measures.items()
        if measure.largest > LARGEST[dtype]
    ]
    if faults:
        raise AdapterDoesNotFit(faults)
    factors: dict[str, HostFactors] = {}
    for path, module in bundle.spec.modules.items():
        b = np.ascontiguousarray(bundle.tensors[f"{path}.lora_B"].float32().swapaxes(-1, -2))
        factors[path] = HostFactors(
            _unscaled(bundle.tensors[f"{path}.lora_A"], dtype), cast(b * np.float32(module.scale), dtype)
        )
    return PreparedBundle(bundle, dtype, MappingProxyType(factors))


def _unscaled(tensor: AdapterTensor, dtype: str) -> NDArray[Any]:
    if dtype == "bfloat16" and tensor.dtype == "BF16":
        return tensor.array
    return cast(tensor.float32(), dtype)


def cast(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Finite float32 values rounded to nearest, ties to even; bfloat16 as its bits, uint16."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
