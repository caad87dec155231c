"""Where versions are resident: low-rank ones in a slot of the stacks, merged and dense ones as a parameter set, an
adapter with whole layers beside it in both. Engine thread only; change it only while no dispatched step is in flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from adapters.prepare import PreparedBundle
from adapters.registry import Content
from adapters.sets import BASE_SET, Build, NoRoom, ParameterSets
from adapters.slots import BASE_SLOT, AdapterSlots
from adapters.spec import Parameter


class QuantisedBase(Exception):
    """A version would unpack quantised layers, which was not allowed; `message` names them."""

    def __init__(self, paths: Sequence[str]) -> None:
        shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
        super().__init__(shown)
        self.message = (
            f"The base is quantised, and this version has parameters of its own for {shown}: with dequantize=true "
            "these layers are served unpacked, at their full size. Nothing changed."
        )


class WeightsFull(Exception):
    """The weights of all versions would take more than they may; `message` says how much."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Placement:
    """What a row's forward uses: a parameter set, and on top of it a slot. The default is the bare base."""

    parameters: int = BASE_SET
    slot: int = BASE_SLOT


BASE_PLACEMENT = Placement()


@dataclass(slots=True)
class _Resident:
    placement: Placement
    references: int


class ResidentVersions:
    """Versions by content; each `stage` of the same one is one more reference to it. `limit` is the most bytes that
    stacks and sets may take together."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[int, int]],
        parameters: Mapping[str, Parameter],
        dtype: mx.Dtype,
        limit: int | None = None,
    ) -> None:
        self.slots = AdapterSlots(model, layers, dtype)
        self.sets = ParameterSets(model, layers, parameters)
        self._limit = limit
        self._residents: dict[Content, _Resident] = {}
        self._build: Build | None = None

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.sets.nbytes

    def advance(self, prepared: PreparedBundle, seconds: float, *, dequantize: bool) -> bool:
        """Computes at most about so long for a parameter set that `stage` will want; True when there is nothing left
        to do before it. One version at a time; a step may be in flight."""
        if Content(prepared.bundle.digest, prepared.mode) in self._residents or not _has_set(prepared):
            return True
        if not dequantize and self.sets.quantised(prepared):
            return True
        build, self._build = self._build, None
        if build is None or build.prepared is not prepared:
            build = self.sets.begin(prepared, None if self._limit is None else self._limit - self.nbytes)
        done = self.sets.advance(build, seconds)
        # Only now: what failed begins anew.
        self._build = build
        return done

    def abandon(self) -> None:
        """Forgets what `advance` computed and nobody staged."""
        self._build = None

    def stage(self, prepared: PreparedBundle, *, dequantize: bool) -> None:
        """Makes a version ready to be routed to. Evaluates what was not computed before, a layer at a time.

        Raises `AdapterDoesNotFit`, `QuantisedBase` unless `dequantize`, or `WeightsFull`, and has changed nothing."""
        content = Content(prepared.bundle.digest, prepared.mode)
        resident = self._residents.get(content)
        if resident is not None:
            resident.references += 1
            return
        packed = [] if dequantize else self.sets.quantised(prepared)
        if packed:
            raise QuantisedBase(packed)
        parameters = self._set(prepared)
        with ExitStack() as undo:
            undo.callback(self.sets.drop, parameters)
            slot = self._stage_slot(prepared, parameters)
            undo.pop_all()
        self._residents[content] = _Resident(Placement(parameters, slot), 1)

    def release(self, content: Content) -> None:
        """One reference less; with the last the memory is free. Raises `KeyError` for what is not staged."""
        resident = self._residents[content]
        resident.references -= 1
        if resident.references:
            return
        del self._residents[content]
        self.sets.drop(resident.placement.parameters)
        if resident.placement.slot != BASE_SLOT:
            self.slots.release(content.digest)

    def placement(self, content: Content) -> Placement:
        """Raises `KeyError` for what is not staged."""
        return self._residents[content].placement

    def size(self, content: Content) -> int:
        """Device memory that a version takes: its parameter set and one slot."""
        placement = self._residents[content].placement
        slot = self.slots.slot_nbytes if placement.slot != BASE_SLOT else 0
        return self.sets.size(placement.parameters) + slot

    def route(self, parameters: int, slots: Sequence[int]) -> None:
        """The next forwards use this parameter set, and row i of them slots[i]."""
        self.sets.mount(parameters)
        self.slots.route(slots)

    def _stage_slot(self, prepared: PreparedBundle, parameters: int) -> int:
        if prepared.mode != "adapter" or not prepared.factors:
            return BASE_SLOT
        total = self.slots.nbytes_with(prepared.bundle) + self.sets.nbytes
        if self._limit is not None and total > self._limit:
            raise WeightsFull(f"with it all of them would take {total} bytes")
        self.sets.mount(parameters)
        gains = self.slots.gains(prepared.bundle)
        # Layers are wrapped only around the base's own.
        self.sets.mount(BASE_SET)
        return self.slots.stage(prepared, gains)

    def _set(self, prepared: PreparedBundle) -> int:
        if not _has_set(prepared):
            return BASE_SET
        self.advance(prepared, math.inf, dequantize=True)
        build, self._build = self._build, None
        if build is None:
            raise RuntimeError("A parameter set was computed and is not there.")
        try:
            return self.sets.finish(build)
        except NoRoom as error:
            raise WeightsFull(f"kept versions hold {self.nbytes} bytes") from error


def _has_set(prepared: PreparedBundle) -> bool:
    return prepared.mode == "merged" or bool(prepared.dense)
