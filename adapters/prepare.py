"""What can be done for a version before the engine's thread takes it: scale folded in, turned and cast, on the host,
and what a DoRA gain is made of besides the base.

Numpy only, so that it can run on any thread; staging then copies, and for DoRA multiplies the base with thin factors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.bundle import NO_PARAMETERS, AdapterBundle
from adapters.errors import AdapterDoesNotFit
from adapters.faults import Fault
from adapters.numerics import Results, Scratch, in_pieces, largest, squared_delta_norms
from adapters.spec import HALVES, AdapterSpec, Mode, Parameter
from adapters.tensors import STORAGE, AdapterTensor

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What safetensors calls the dtypes that a model's activations may have."""
LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}
"""Finite value of each dtype that a model's activations may have."""

UPPER, LAST, HALF = np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
"""Where bfloat16 begins in a float32's bits, its last bit there, and what is almost half of that."""
UPPER_HALF = int(sys.byteorder == "little")
"""The place of the upper one of a float32's two halves in memory."""


@dataclass(frozen=True, slots=True)
class HostFactors:
    """Factors of one layer, in the model's dtype; bfloat16 as its bits, uint16."""

    a: NDArray[Any]
    """[rank, in], or [experts, rank, in]."""
    b: NDArray[Any]
    """[rank, out] or [experts, rank, out], scale folded in."""


@dataclass(frozen=True, slots=True)
class HostDelta:
    """All of the gain of a DoRA version's layer that can be known without the base."""

    a: NDArray[np.float32]
    """[rank, in], without ranks that are zero."""
    b: NDArray[np.float32]
    """[out, rank], likewise, unscaled."""
    scale: float
    magnitude: NDArray[np.float32]
    """[out]"""
    squared: NDArray[np.float64]
    """‖scale · B · A‖² of each row [out]."""


@dataclass(frozen=True, slots=True)
class PreparedBundle:
    bundle: AdapterBundle
    mode: Mode
    dtype: str
    """The dtype of the factors as mlx calls it: `float32`, `float16` or `bfloat16`; float32 where they will be
    merged."""
    factors: Mapping[str, HostFactors]
    """Factors by the layer's path."""
    dense: Mapping[str, NDArray[Any]]
    """Whole tensors by parameter path: float32 where one is added to the base's, else in the parameter's dtype."""
    deltas: Mapping[str, HostDelta]
    """Deltas by the layer's path; empty for LoRA, and where the factors will be merged."""

    @property
    def nbytes(self) -> int:
        """Bytes that staging copies."""
        return sum(factors.a.nbytes + factors.b.nbytes for factors in self.factors.values())


def prepare(
    bundle: AdapterBundle,
    dtype: str,
    *,
    mode: Mode | None = None,
    parameters: Mapping[str, Parameter] = NO_PARAMETERS,
    factors: Mapping[str, HostFactors] | None = None,
) -> PreparedBundle:
    """Prepares a bundle for one of its modes, the usual one by default; `factors` are its `host_factors` for this mode,
    where they are made already. Raises `AdapterDoesNotFit` where a value leaves the range of `dtype`, that of the
    model's activations, or of the parameter in whose place it is, or where there is no such parameter, as in an engine
    of several ranks."""
    mode = mode or bundle.spec.modes[0]
    if mode not in bundle.spec.modes:
        raise ValueError(f"A bundle of kind {bundle.spec.kind} is not served in mode {mode}.")
    if mode == "merged":
        dtype = "float32"
    adds = bundle.spec.kind == "delta"
    faults = [
        _outside(path, measure.largest, f"{dtype}, the dtype of the model")
        for path, measure in bundle.measures.items()
        if measure.largest > LARGEST[dtype]
    ]
    faults += [fault for path in bundle.spec.dense if not adds for fault in _unlike(bundle, path, parameters)]
    if faults:
        raise AdapterDoesNotFit(faults)
    if factors is None:
        factors = host_factors(bundle.spec, bundle.tensors, dtype, mode)
    dense = {
        path: _unscaled(bundle.tensors[path], "float32" if adds else parameters[path].dtype)
        for path in bundle.spec.dense
    }
    gained = bundle.spec.modules if bundle.spec.kind == "dora" and mode == "adapter" else ()
    deltas = {path: _delta(bundle, path) for path in gained}
    return PreparedBundle(
        bundle, mode, dtype, MappingProxyType(factors), MappingProxyType(dense), MappingProxyType(deltas)
    )


def host_factors(
    spec: AdapterSpec, tensors: Mapping[str, AdapterTensor], dtype: str, mode: Mode
) -> dict[str, HostFactors]:
    """Factors of all layers for a model of this dtype, the scale folded into B; a value that leaves its range becomes
    infinite, which `prepare` refuses. What is not in the file as it is needed lies in one piece of memory."""
    dtype = "float32" if mode == "merged" else dtype
    scratch, wide = Scratch(), Scratch()
    pairs = {path: [tensors[f"{path}.{half}"] for half in HALVES] for path in spec.modules}
    made = [a for a, _ in pairs.values() if a.dtype != STORED[dtype]] + [b for _, b in pairs.values()]
    results = Results(sum(tensor.array.size for tensor in made), STORAGE[STORED[dtype]])
    factors: dict[str, HostFactors] = {}
    with np.errstate(over="ignore"):
        for path, (a, b) in pairs.items():
            kept_a, kept_b = a.array, results.array((*b.array.shape[:-2], b.array.shape[-1], b.array.shape[-2]))
            if a.dtype != STORED[dtype]:
                kept_a = results.array(a.array.shape)
                _cast(a.float32(wide), dtype, kept_a, scratch)
            _cast(b.float32(wide), dtype, kept_b.swapaxes(-1, -2), scratch, spec.modules[path].scale)
            factors[path] = HostFactors(kept_a, kept_b)
    return factors


def _unlike(bundle: AdapterBundle, path: str, parameters: Mapping[str, Parameter]) -> Iterator[Fault]:
    if path not in parameters:
        yield Fault(
            f"{path} is no parameter that a version can replace here.",
            "tensors are no parameters that a version can replace here",
            path,
            "An engine of several ranks serves LoRA and DoRA only.",
        )
        return
    dtype = parameters[path].dtype
    most = largest(bundle.tensors[path].float32())
    if most > LARGEST[dtype]:
        yield _outside(path, most, f"{dtype}, the dtype of this parameter")


def _outside(path: str, largest: float, range_of: str) -> Fault:
    return Fault(
        f"{path}: {largest:.3g} is outside the range of {range_of}.",
        f"tensors have values outside the range of {range_of}",
        f"{path} ({largest:.3g})",
    )


def _delta(bundle: AdapterBundle, path: str) -> HostDelta:
    a, b, magnitude = (bundle.tensors[f"{path}.{part}"].float32() for part in bundle.spec.parts)
    scale = bundle.spec.modules[path].scale
    # Ranks that add nothing, as all do before the first step of training, need no product with the base.
    adding: NDArray[np.bool_] = np.logical_and(a.any(axis=1), b.any(axis=0))
    adding[0] = True
    if not adding.all():
        a, b = a[adding], b[:, adding]
    return HostDelta(a, b, scale, magnitude, squared_delta_norms(a, b, scale))


def _unscaled(tensor: AdapterTensor, dtype: str) -> NDArray[Any]:
    return tensor.array if tensor.dtype == STORED[dtype] else cast(tensor.float32(), dtype)


def cast(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Finite float32 values rounded to nearest, ties to even; bfloat16 as its bits, uint16."""
    if dtype == "float32":
        return values
    kept = np.empty(values.shape, STORAGE[STORED[dtype]])
    _cast(values, dtype, kept, Scratch())
    return kept


def _cast(
    values: NDArray[np.float32], dtype: str, out: NDArray[Any], scratch: Scratch, scale: float | None = None
) -> None:
    """Writes what `cast` makes of scale · values, a product in float32, into `out` of the same shape."""
    for piece in in_pieces(values):
        given: NDArray[Any] = values[piece]
        if scale is not None:
            given = np.multiply(given, np.float32(scale), out=scratch.array("scaled", given.shape, np.float32))
        if dtype == "bfloat16":
            given = _rounded(given, scratch)
        np.copyto(out[piece], given, casting="same_kind")


def _rounded(values: NDArray[np.float32], scratch: Scratch) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, a view of `scratch`: the upper half of the sum of a float32's bits, 0x7FFF and
    the last bit that stays."""
    bits = values.view(np.uint32)
    rounded = scratch.array("rounded", bits.shape, np.uint32)
    np.right_shift(bits, UPPER, out=rounded)
    np.bitwise_and(rounded, LAST, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.add(rounded, HALF, out=rounded)
    halves: NDArray[np.uint16] = rounded.view(np.uint16)
    return halves[..., UPPER_HALF::2]
