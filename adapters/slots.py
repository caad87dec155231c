"""Which versions are resident: stacked A, B and gain of every adapted layer, one slot per version, slot 0 the base.

Only the engine thread may use this, and only while no dispatched step is in flight: a write is in place because
nothing else refers to the stacks then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.bundle import AdapterBundle
from adapters.experts import AdaptedExperts
from adapters.find import bare_layer, holder
from adapters.layers import AdaptedEmbedding, AdaptedLinear, SlotStack, round_rank
from adapters.norms import RowNorms, Rows, TableRows
from adapters.prepare import LARGEST, HostFactors, PreparedBundle, cast, prepare
from adapters.sets import SplitEmbedding
from adapters.spec import MAGNITUDE, AdapterDoesNotFit, experts_of, place_of

Gains = dict[str, NDArray[np.float32]]
BASE_SLOT = 0
FIRST_CAPACITY = 4


@dataclass(slots=True)
class _Resident:
    slot: int
    references: int


class AdapterSlots:
    """`layers` is parameter path → (out, in) of every adaptable layer of `model`; `dtype` that of its activations.

    Layers are wrapped when the first version that targets them is staged; the rest of the model stays as it was.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, tuple[int, int]], dtype: mx.Dtype) -> None:
        self._model = model
        self._layers = dict(layers)
        self._dtype = dtype
        self._dtype_name = str(dtype).removeprefix("mlx.core.")
        self._capacity = FIRST_CAPACITY
        self._stacks: dict[str, SlotStack] = {}
        self._residents: dict[str, _Resident] = {}
        self._norms = RowNorms()
        self._routed: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks, free slots included."""
        return sum(stack.nbytes for stack in self._stacks.values())

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot, the same for all: stacks are as wide as the largest rank in them."""
        return self.nbytes // self._capacity

    def nbytes_with(self, bundle: AdapterBundle) -> int:
        """What `nbytes` would come to if this bundle were staged now; nothing is changed."""
        if bundle.digest in self._residents:
            return self.nbytes
        capacity, in_use = self._capacity_for(self._free_slot()), self._in_use()
        total = 0
        for path in self._stacks.keys() | bundle.spec.modules.keys():
            stack, module = self._stacks.get(path), bundle.spec.modules.get(path)
            rank, gained = stack.shrunk(capacity, in_use)[1:] if stack else (0, False)
            rank = max(rank, round_rank(module.rank) if module else 0)
            gained = gained or (module is not None and bundle.spec.kind == "dora")
            out, width = self._layers[path]
            one = math.prod(experts_of(self._layers[path])) * rank * (out + width) + (out if gained else 0)
            total += capacity * one * self._dtype.size
        return total

    @property
    def slots_in_use(self) -> int:
        return len(self._residents)

    def stage(self, version: AdapterBundle | PreparedBundle, gains: Gains | None = None) -> int:
        """The slot (1 and up) that holds the version, with one more reference. Evaluates what it writes. A bundle that
        was prepared elsewhere, for the model's dtype, is only copied; `gains` are those of `gains()`, where another
        parameter set than the base was mounted for them.

        Raises `AdapterDoesNotFit`, before anything is written, where a value leaves the range of the model's dtype or
        a DoRA gain is not finite."""
        bundle = version if isinstance(version, AdapterBundle) else version.bundle
        resident = self._residents.get(bundle.digest)
        if resident is not None:
            resident.references += 1
            return resident.slot
        if not isinstance(version, PreparedBundle) or version.dtype != self._dtype_name:
            version = prepare(bundle, self._dtype_name)
        gains = self.gains(bundle) if gains is None else gains
        slot = self._free_slot()
        for stack in self._stacks.values():
            stack.rest()
        try:
            self._fit_capacity(slot)
            self._write(slot, version.factors, gains)
        finally:
            self._aim(self._routed)
        self._residents[bundle.digest] = _Resident(slot, 1)
        return slot

    def release(self, digest: str) -> None:
        """One reference less; with the last the slot is free. Raises `KeyError` for a digest that is not staged."""
        resident = self._residents[digest]
        resident.references -= 1
        if resident.references == 0:
            del self._residents[digest]
            self._routed = None

    def slot(self, digest: str) -> int:
        """Where a staged bundle sits. Raises `KeyError` for a digest that is not staged."""
        return self._residents[digest].slot

    def route(self, slots: Sequence[int]) -> None:
        """Row i of every following forward uses slots[i]; 0 is the base. Raises `ValueError` for a free slot.

        Where all are equal the batch may have any size, else it must be that of `slots`."""
        wanted = tuple(slots)
        if wanted == self._routed:
            return
        free = set(wanted) - {resident.slot for resident in self._residents.values()} - {BASE_SLOT}
        if free:
            raise ValueError(f"Slots {sorted(free)} hold no adapter version.")
        self._aim(wanted)
        self._routed = wanted

    def lent(self) -> tuple[tuple[str, ...], list[mx.array]]:
        """What the wrapped layers read as they are aimed now: which fields of each stack, and all their arrays. Hold
        them no longer than a forward: a write copies a stack that somebody holds."""
        lent = [stack.lent() for stack in self._stacks.values()]
        return tuple(fields for fields, _ in lent), [array for _, arrays in lent for array in arrays]

    @contextmanager
    def reading(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Within it every stack reads these arrays, in the order of `lent`, as while a forward is traced."""
        fields = self.lent()[0]
        left, before = list(arrays), []
        for stack, names in zip(self._stacks.values(), fields, strict=True):
            before += stack.read(names, left)
        try:
            yield
        finally:
            for stack, names in zip(self._stacks.values(), fields, strict=True):
                stack.read(names, before)

    def unmount(self) -> None:
        """Put the bare layers back, by reference, and forget every version."""
        for path in self._stacks:
            parent, name = holder(self._model, self._wrapped_path(path))
            parent[name] = bare_layer(parent[name])
        self._stacks.clear()
        self._residents.clear()
        self._routed = None

    def _aim(self, slots: tuple[int, ...] | None) -> None:
        slots = slots or (BASE_SLOT,)
        distinct = frozenset(slots)
        if len(distinct) == 1:
            (slot,) = distinct
            for stack in self._stacks.values():
                stack.aim(slot)
            return
        rows = mx.array(slots, dtype=mx.uint32)
        for stack in self._stacks.values():
            stack.aim_rows(distinct, rows)

    def _free_slot(self) -> int:
        taken = {resident.slot for resident in self._residents.values()}
        return next(slot for slot in range(1, len(taken) + 2) if slot not in taken)

    def _fit_capacity(self, slot: int) -> None:
        """Room for this slot and those in use; what is twice too large, in slots or in rank, is given back."""
        self._capacity = self._capacity_for(slot)
        for stack in self._stacks.values():
            stack.shrink(self._capacity, self._in_use())

    def _capacity_for(self, slot: int) -> int:
        needed = max(self._in_use() | {slot, FIRST_CAPACITY - 1}) + 1
        if needed > self._capacity:
            return max((self._capacity * 3 // 2 + 3) // 4 * 4, needed)
        return (needed + 3) // 4 * 4 if 2 * needed <= self._capacity else self._capacity

    def _in_use(self) -> set[int]:
        return {resident.slot for resident in self._residents.values()}

    def gains(self, bundle: AdapterBundle) -> Gains:
        """m / ‖W + scale · B · A‖ of each layer [out], computed in float64 from the weights that are mounted; empty
        for LoRA. Raises `AdapterDoesNotFit`."""
        limit = LARGEST[self._dtype_name]
        gains: Gains = {}
        faults: list[str] = []
        for path, module in bundle.spec.modules.items() if bundle.spec.kind == "dora" else ():
            a, b, magnitude = (bundle.tensors[f"{path}.{part}"].float32() for part in bundle.spec.parts)
            # A whole tensor of the bundle itself may stand in place of the base's weight.
            cache = RowNorms() if self._weight_path(path) in bundle.spec.dense else self._norms
            norms = cache.adapted(path, self._weights(path), a, b, module.scale)
            with np.errstate(divide="ignore", invalid="ignore"):
                gain = magnitude / norms
            if np.all(np.abs(gain) <= limit):
                gains[path] = gain.astype(np.float32)
            else:
                row = int(np.argmin(np.abs(gain) <= limit))
                faults.append(
                    f"{path}.{MAGNITUDE}: {magnitude[row]:.3g} for output {row}, whose weights have the length "
                    f"{norms[row]:.3g}, is a gain outside the range of {self._dtype}, the dtype of the model."
                )
        if faults:
            raise AdapterDoesNotFit(faults)
        return gains

    def _write(self, slot: int, factors: Mapping[str, HostFactors], gains: Gains) -> None:
        for path, new in factors.items():
            stack = self._stacks.get(path) or self._mount(path)
            stack.reserve(self._capacity, new.a.shape[-2])
            gain = self._array(cast(gains[path], self._dtype_name)) if path in gains else None
            stack.write(slot, self._array(new.a), self._array(new.b), gain)
        for path, stack in self._stacks.items():
            if path not in factors:
                stack.reserve(self._capacity, 0)
                stack.clear(slot)
        mx.eval([stack.arrays() for stack in self._stacks.values()])
        for path, stack in self._stacks.items():
            if path not in factors:
                stack.filled.pop(slot, None)
            if path not in gains:
                stack.gained.discard(slot)

    def _array(self, values: NDArray[Any]) -> mx.array:
        return mx.array(values).view(self._dtype) if self._dtype == mx.bfloat16 else mx.array(values)

    def _mount(self, path: str) -> SlotStack:
        place = place_of(self._layers[path])
        parent, name = holder(self._model, self._wrapped_path(path))
        stack = SlotStack(self._capacity, 0, self._layers[path], self._dtype)
        if place == "linear":
            parent[name] = AdaptedLinear(parent[name], stack)
        elif place == "experts":
            if not isinstance(parent[name], AdaptedExperts):
                parent[name] = AdaptedExperts(parent[name])
            parent[name].attach(stack, path.rpartition(".")[2])
        else:
            if not isinstance(parent[name], AdaptedEmbedding):
                parent[name] = AdaptedEmbedding(parent[name])
            parent[name].attach(stack, head=place == "tied_head")
        self._stacks[path] = stack
        return stack

    def _weights(self, path: str) -> Rows:
        parent, name = holder(self._model, self._wrapped_path(path))
        place, layer = place_of(self._layers[path]), bare_layer(parent[name])
        if isinstance(layer, SplitEmbedding):
            layer = layer["head" if place == "tied_head" else "table"]
        return TableRows(layer) if place in ("embedding", "tied_embedding") else Rows(layer)

    def _weight_path(self, path: str) -> str:
        """The parameter that decides the layer's weight: for a tied head that has none of its own, the embedding's."""
        return f"{path}.weight" if place_of(self._layers[path]) != "tied_head" else f"{self._wrapped_path(path)}.weight"

    def _wrapped_path(self, path: str) -> str:
        """What is wrapped for the layer at `path`: for a tied head the embedding, for experts the block around them."""
        place = place_of(self._layers[path])
        if place == "experts":
            return path.rpartition(".")[0]
        if place != "tied_head":
            return path
        return next(other for other, shape in self._layers.items() if place_of(shape) == "tied_embedding")
