"""A version on its way into a slot: what is done and what is left, while rows go on decoding in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterDoesNotFit
from adapters.faults import Fault
from adapters.kernels.text import Device
from adapters.prepare import LARGEST, PreparedBundle
from adapters.resident.dora_norms import BLOCK_VALUES, AdaptedNorms, AdaptedRows
from adapters.resident.layers.slot_stack import SlotStack
from adapters.spec import MAGNITUDE

WRITE_BYTES = 12 << 20
"""Written, or moved where a stack grows, before the clock is asked again."""
BESIDE_BYTES = 1 << 30
"""Stacks of at most this size are copied by an NVIDIA GPU in far less time than a decode step takes."""


def written_beside(nbytes: int, device: Device | None) -> bool:
    """Returns whether versions are written into stacks of this size behind a step in flight, without waiting for it: a
    device that waits for its host would stand still from the end of that step until the next one is built. The stacks
    are there twice until then. Only on CUDA: others copy at a tenth of the speed, or have no host to wait for."""
    return device == "cuda" and nbytes <= BESIDE_BYTES


class Gains:
    """m / ‖W + scale · B · A‖ of each layer of a DoRA version, in turns: `measure` until it is true. Reads the base
    and writes nothing."""

    def __init__(self, prepared: PreparedBundle, norms: Iterable[AdaptedNorms]) -> None:
        self._prepared = prepared
        self._waiting = deque(norms)
        self._dispatched: list[AdaptedNorms] = []
        self.found: dict[str, NDArray[np.float32]] = {}
        """[out] of each layer, when all are measured; empty for LoRA."""
        self.changes: dict[str, float] = {}
        """‖W' − W‖ of each of them."""
        self._faults: list[Fault] = []

    def measure(self, allowance: int | None) -> bool:
        """Takes what the device has computed since the last call, dispatches products of about this cost
        (`AdaptedNorms.next_piece`), and returns whether all gains are found: at the earliest in the call after the last
        product was dispatched. None does all at once.

        Raises `AdapterDoesNotFit`, at the end, where a gain is not finite in the model's dtype."""
        self._find()
        while self._waiting:
            pieces = self._pieces(BLOCK_VALUES if allowance is None else allowance)
            if allowance is not None:
                mx.async_eval(pieces)
                return False
            mx.eval(pieces)  # One after another, to bound what is unpacked at a time.
            self._find()
        if self._faults:
            raise AdapterDoesNotFit(self._faults)
        return True

    def _pieces(self, allowance: int) -> list[mx.array]:
        pieces: list[mx.array] = []
        while self._waiting and allowance > 0:
            arrays, cost = self._waiting[0].next_piece()
            pieces += arrays
            allowance -= cost
            if self._waiting[0].dispatched:
                self._dispatched.append(self._waiting.popleft())
        return pieces

    def _find(self) -> None:
        layers, self._dispatched = self._dispatched, []
        if not layers:
            return
        rows = AdaptedRows.of(layers)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.concatenate([layer.delta.magnitude for layer in layers], dtype=np.float64) / rows.lengths
        fits = np.abs(gain) <= LARGEST[self._prepared.dtype]
        if not fits.all():
            for layer, lengths, right in zip(layers, rows.split(rows.lengths), rows.split(fits), strict=True):
                self._faults += [] if right.all() else [self._fault(layer, lengths, int(np.argmin(right)))]
            return
        self.changes |= zip((layer.path for layer in layers), rows.changes(gain), strict=True)
        self.found |= zip((layer.path for layer in layers), rows.split(gain.astype(np.float32)), strict=True)

    def _fault(self, layer: AdaptedNorms, lengths: NDArray[np.float64], row: int) -> Fault:
        dtype, magnitude = self._prepared.dtype, layer.delta.magnitude[row]
        where = f"{layer.path}.{MAGNITUDE}"
        what = f"{magnitude:.3g} for output {row}, whose weights have the length {lengths[row]:.3g}"
        return Fault(
            f"{where}: {what}, is a gain outside the range of {dtype}, the dtype of the model.",
            f"magnitudes are gains outside the range of {dtype}, the dtype of the model",
            f"{where} ({what})",
        )


@dataclass(slots=True)
class Staging:
    """Made by `AdapterSlots.begin`, taken further by `measure` and `write`. Left alone at any point it costs nothing:
    only `AdapterSlots.stage` makes its slot one that rows may use."""

    prepared: PreparedBundle
    gains: Gains
    beside: bool = False
    """It is `written_beside` the step in flight."""
    slot: int | None = None
    """Where it is being written."""
    unwritten: deque[str] = field(default_factory=deque)
    """Layers whose stacks are still to be written, once it has a slot."""
    brought: tuple[list[str], Iterator[mx.array]] | None = None
    """The next of them, and what is to be written for each that the version changes: its A, its B."""
    seconds: float = 0.0
    """Spent on it so far."""

    @property
    def digest(self) -> str:
        return self.prepared.bundle.digest

    def bring(self, stacks: Mapping[str, SlotStack], capacity: int, dtype: mx.Dtype) -> None:
        """Takes the next layers off what is left and dispatches the copy of their values to the device: those whose
        writes, and moves where a stack grows to `capacity` slots, come to about `WRITE_BYTES`."""
        if self.brought is not None:
            return
        paths: list[str] = []
        values: list[NDArray[Any]] = []
        moved = 0
        while self.unwritten and moved < WRITE_BYTES:
            path = self.unwritten.popleft()
            paths.append(path)
            stack, new = stacks[path], self.prepared.factors.get(path)
            if new is not None:
                grows = capacity > stack.shape[0] or new.a.shape[-2] > stack.shape[1]
                moved += (new.a.nbytes + new.b.nbytes) * (capacity if grows else 1)
                values += [new.a, new.b]
        arrays = on_device(values, dtype)
        mx.async_eval(arrays)
        self.brought = paths, iter(arrays)

    def take(
        self, stacks: Mapping[str, SlotStack], capacity: int, dtype: mx.Dtype
    ) -> tuple[list[str], Iterator[mx.array]]:
        """What was brought, or is now."""
        self.bring(stacks, capacity, dtype)
        if self.brought is None:
            raise RuntimeError("What a version writes next was not brought.")
        taken, self.brought = self.brought, None
        return taken

    @property
    def written(self) -> bool:
        """Nothing is left to be written."""
        return not self.unwritten and self.brought is None

    @contextmanager
    def timed(self) -> Iterator[float]:
        """Counts what is done inside; gives the moment it began."""
        began = time.perf_counter()
        try:
            yield began
        finally:
            self.seconds += time.perf_counter() - began


def on_device(values: Sequence[NDArray[Any]], dtype: mx.Dtype) -> list[mx.array]:
    """Arrays of these values, bfloat16 from its bits, in one copy: a device pays for each that comes from the host."""
    if not values:
        return []
    flat = mx.array(np.concatenate([each.ravel() for each in values]))
    flat = flat.view(dtype) if dtype == mx.bfloat16 else flat
    ends = np.cumsum([each.size for each in values]).tolist()
    parts = [flat[end - each.size : end] for end, each in zip(ends, values, strict=True)]
    return [part.reshape(each.shape) for part, each in zip(parts, values, strict=True)]
