"""A version on its way into a slot: what is done and what is left, while rows go on decoding in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterDoesNotFit
from adapters.faults import Fault
from adapters.prepare import LARGEST, PreparedBundle
from adapters.resident.dora_norms import BLOCK_VALUES, AdaptedNorms, AdaptedRows
from adapters.spec import MAGNITUDE


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
    slot: int | None = None
    """Where it is being written."""
    unwritten: deque[str] = field(default_factory=deque)
    """Layers whose stacks are still to be written, once it has a slot."""
    seconds: float = 0.0
    """Spent on it so far."""

    @property
    def digest(self) -> str:
        return self.prepared.bundle.digest

    @contextmanager
    def timed(self) -> Iterator[float]:
        """Counts what is done inside; gives the moment it began."""
        began = time.perf_counter()
        try:
            yield began
        finally:
            self.seconds += time.perf_counter() - began
