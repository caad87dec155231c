"""Chooses whether a kernel adds the low-rank products of linear layers in decode steps: only where it gives on this
device what plain products give, for layers alone and for those that share a launch, and takes less time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.kernels.decode import DecodeKernel
from adapters.kernels.low_rank import LowRankKernel
from adapters.kernels.matrix import MatrixKernel
from adapters.kernels.numbers import device_numbers
from adapters.kernels.text import own_device
from adapters.resident.device_check import (
    ROUTES,
    Array,
    Versions,
    compared_outputs,
    difference,
    in_float64,
    layer_at,
    size_of,
)
from adapters.resident.layers.linear import SHARE_AN_INPUT, AdaptedLinear, SharedInput
from adapters.spec import place_of

log = logging.getLogger("rollout_server.engine.model")

NARROW, USUAL = (3, 8), (11, 16)
"""Ranks of the two versions that are tried. Threads read them in tiles of 8 or of 16, which is another text."""
ALONE = (*ROUTES, (0, 1, 2) * 44, (1,) * 131, (2,) * 64, (2, 0, 2, 1) * 32)
"""Slots of the rows of decode steps: rows of one version and of several, few and many of them."""
TOGETHER = (*ROUTES, (2, 0, 2, 1) * 32)
"""Those of layers that share a launch, which were tried alone before."""
TIMED = ((NARROW, (2,) * 64), (USUAL, (2,) * 64), (USUAL, (2, 0, 2, 1) * 16))
"""Ranks and slots, in all of which the kernel is to be faster."""
TIMED_AT_ONCE = 50
TRIES = 3


def choose_kernel(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    dtype: mx.Dtype,
    tries: Sequence[LowRankKernel] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LowRankKernel | None:
    """The first kernel for the linear layers of a bare `model` that is `proven`, of `tries` or of those for this
    device; None where none is, and on a CPU, which has none."""
    some = kernels() if tries is None else tries
    return next((kernel for kernel in some if proven(kernel, model, layers, dtype, clock) is not None), None)


def kernels() -> list[LowRankKernel]:
    """Those for the default device, in the order in which they are tried: on an H200 the first takes the least time."""
    device = own_device()
    if device is None:
        return []
    by_threads = DecodeKernel(device)
    return [MatrixKernel(device), by_threads] if device == "cuda" else [by_threads]


def proven(
    kernel: LowRankKernel,
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    dtype: mx.Dtype,
    clock: Callable[[], float] = time.perf_counter,
) -> LowRankKernel | None:
    """The kernel, if all that it is asked here comes out right and sooner. One that fails ends no start. `layers` is
    what `adaptable_layers` finds in the model, `dtype` that of its activations; `clock` is in seconds."""
    groups = groups_of(model, layers)
    if not groups:
        return None
    try:
        for paths in groups:
            several = [layer_at(model, layers, path) for path in paths]
            for ranks in (NARROW, USUAL):
                fault = _fault(kernel, several, [layers[path] for path in paths], dtype, ranks)
                if fault is not None:
                    log.warning("Adapters do not go by %s: in %s, %s.", kernel.name, " + ".join(paths), fault)
                    return None
        path = groups[0][0]
        return kernel if _is_faster(kernel, layer_at(model, layers, path), layers[path], dtype, clock) else None
    except (RuntimeError, ValueError) as error:
        log.warning("Adapters do not go by %s: that ends in %s: %s.", kernel.name, type(error).__name__, error)
        return None


def groups_of(model: nn.Module, layers: Mapping[str, tuple[int, int]]) -> list[tuple[str, ...]]:
    """Paths of linear layers: one of every kind alone, and then two and three that may share a launch, since a version
    need not be on all that do. Launches of so many layers are another text."""
    linear = [path for path, shape in layers.items() if place_of(shape) == "linear"]
    blocks: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path in linear:
        block, _, name = path.rpartition(".")
        for names in SHARE_AN_INPUT:
            if name in names:
                blocks.setdefault((block, names), []).append(path)
    groups: list[tuple[str, ...]] = [(path,) for path in linear]
    for count in (2, 3):
        groups += [some for paths in blocks.values() for some in combinations(paths, count)]
    kinds: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for paths in groups:
        if len({layers[path][1] for path in paths}) == 1:
            kind = tuple((*layers[path], "bias" in layer_at(model, layers, path)) for path in paths)
            kinds.setdefault(kind, paths)
    return list(kinds.values())


@dataclass(frozen=True, slots=True, eq=False)
class _Tried:
    """One layer of a launch, and which of its outputs are compared."""

    adapted: AdaptedLinear
    versions: Versions
    some: NDArray[np.int64]
    bias: Array

    @classmethod
    def make(
        cls, layer: nn.Module, shape: tuple[int, int], dtype: mx.Dtype, ranks: tuple[int, ...], shared: SharedInput
    ) -> _Tried:
        some = compared_outputs(shape[0])
        bias = in_float64(layer["bias"])[some] if "bias" in layer else np.zeros(len(some))
        x = mx.array(np.random.default_rng(1).standard_normal((4, 1, shape[1]))).astype(dtype)
        strength = size_of(in_float64(layer(x)[..., mx.array(some)]) - bias)
        versions = Versions.make(shape, dtype, strength, ranks)
        return cls(AdaptedLinear(layer, versions.stack, shared), versions, some, bias)

    def fault(self, x: mx.array, found: mx.array, route: tuple[int, ...], dtype: mx.Dtype) -> str | None:
        """What is wrong with the layer's outputs for x [rows, 1, in]."""
        some, slots = mx.array(self.some), np.array(route)
        given, outputs = in_float64(x), in_float64(found[..., some])
        plain = in_float64(self.adapted["base"](x)[..., some]) - self.bias
        for slot in sorted(set(route)):
            rows, versions = slots == slot, self.versions
            added = given[rows] @ versions.a[slot].T @ versions.b[slot][:, self.some]
            expected = versions.gain[slot][self.some] * (plain[rows] + added) + self.bias
            if (said := difference(outputs[rows], expected, dtype)) is not None:
                return said
        return None


def _fault(
    kernel: LowRankKernel,
    layers: Sequence[nn.Module],
    shapes: Sequence[tuple[int, int]],
    dtype: mx.Dtype,
    ranks: tuple[int, ...],
) -> str | None:
    """What is wrong first, of layers that are given the same input, as a block gives it to them."""
    shared, random = SharedInput(), np.random.default_rng(shapes[0][0])
    tried = [_Tried.make(layer, shape, dtype, ranks, shared) for layer, shape in zip(layers, shapes, strict=True)]
    for route in ALONE if len(layers) == 1 else TOGETHER:
        x = mx.array(random.standard_normal((len(route), 1, shapes[0][1]))).astype(dtype)
        rows = device_numbers(route if len(set(route)) > 1 else route[:1], mx.uint32)
        for each in tried:
            each.versions.stack.kernel = kernel
            each.versions.aim(route, rows)
        found = [each.adapted(x) for each in tried]
        for each, outputs in zip(tried, found, strict=True):
            if (said := each.fault(x, outputs, route, dtype)) is not None:
                return f"the output for {_spoken(route)} of ranks up to {max(ranks)} {said}"
    return None


def _is_faster(
    kernel: LowRankKernel, layer: nn.Module, shape: tuple[int, int], dtype: mx.Dtype, clock: Callable[[], float]
) -> bool:
    for ranks, route in TIMED:
        versions, x = Versions.make(shape, dtype, 1.0, ranks), mx.zeros((len(route), 1, shape[1]), dtype)
        adapted, taken = AdaptedLinear(layer, versions.stack), []
        for tried in (None, kernel):
            versions.stack.kernel = tried
            versions.aim(route)
            if tried is not None and not adapted.takes(x):
                log.info("Adapters do not go by %s, which take no such layer in this dtype.", kernel.name)
                return False
            taken.append(1e3 * _seconds(adapted, x, clock))
        plainly, by_kernel = taken
        faster = by_kernel < plainly
        log.info(
            "Adapters %s by %s: for %d %s of ranks up to %d a layer takes %.3f ms by these, %.3f by plain products.",
            "may go" if faster else "do not go", kernel.name, len(route), _spoken(route), max(ranks), by_kernel,
            plainly,
        )  # fmt: skip
        if not faster:
            return False
    return True


def _seconds(layer: Callable[[mx.array], mx.array], x: mx.array, clock: Callable[[], float]) -> float:
    """One of many at once, since one alone is mostly waited for; the fastest of some tries, after one that compiles."""
    taken = []
    for _ in range(TRIES + 1):
        began = clock()
        mx.eval([layer(x) for _ in range(TIMED_AT_ONCE)])
        taken.append(clock() - began)
    return min(taken[1:]) / TIMED_AT_ONCE


def _spoken(route: tuple[int, ...]) -> str:
    return "rows of one version" if len(set(route)) == 1 else "rows of several versions"
