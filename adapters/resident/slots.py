"""Which versions are resident: stacked A, B and gain of every adapted layer, one slot per version, slot 0 the base.

Only the engine thread may use this. A write is in place where nothing else refers to the stacks, so it is done while no
dispatched step is in flight; where it is `written_beside` one it copies the stacks that the step reads.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.bundle import AdapterBundle
from adapters.errors import AdapterDoesNotFit
from adapters.kernels.low_rank import LowRankKernel
from adapters.kernels.numbers import device_numbers
from adapters.kernels.text import own_device
from adapters.placement import BASE_SLOT
from adapters.prepare import PreparedBundle, cast, prepare
from adapters.resident.cuts import Cut, own_part
from adapters.resident.dora_norms import RowNorms, Rows, TableRows
from adapters.resident.layers.embedding import AdaptedEmbedding
from adapters.resident.layers.experts import AdaptedExperts
from adapters.resident.layers.linear import SHARE_AN_INPUT, AdaptedLinear, SharedInput, SummedLinear
from adapters.resident.layers.slot_stack import ONE, SlotStack, round_rank, round_width
from adapters.resident.model_layers import CUT_INPUTS, bare_layer, holder
from adapters.resident.parameter_sets import SplitEmbedding
from adapters.resident.staging import Gains, Staging, on_device, written_beside
from adapters.spec import Place, experts_of, place_of

PLACES: Mapping[Place, str] = MappingProxyType(
    {
        "linear": "linear layers",
        "embedding": "the embedding",
        "tied_embedding": "the embedding",
        "tied_head": "the head that shares the embedding's weight",
        "experts": "stacked experts",
    }
)
"""What a sentence calls the layers at a place."""
FIRST_CAPACITY = 4
TURNS = 4
"""Steps over which the products of a thin DoRA version are spread: each then costs a batch of rows little."""


class AdapterSlots:
    """`layers` is parameter path → (out, in) of every adaptable layer of `model`; `dtype` that of its activations.
    `unfit` is what `device_check.check_adapters` found: versions that target such layers are refused. `kernel` is what
    `kernel_choice.choose_kernel` found for linear layers, and `cuts` are those of layers that are cut over ranks.

    Layers are wrapped when the first version that targets them is staged; the rest of the model stays as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[int, int]],
        dtype: mx.Dtype,
        unfit: Mapping[Place, str] = MappingProxyType({}),
        kernel: LowRankKernel | None = None,
        clock: Callable[[], float] = time.monotonic,
        cuts: Mapping[str, Cut] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._cuts = cuts
        self._clock = clock
        self._unfit = unfit
        self._kernel = kernel
        self._layers = dict(layers)
        self._dtype = dtype
        self._dtype_name = str(dtype).removeprefix("mlx.core.")
        self._capacity = FIRST_CAPACITY
        self._stacks: dict[str, SlotStack] = {}
        self._filled: dict[str, int] = {}
        """The slot of each version by its digest. Whoever stages counts by whom it is needed."""
        self._norms = RowNorms()
        values = sum(math.prod((*experts_of(shape), *shape)) for shape in self._layers.values())
        self._allowance = max(values // TURNS, 1)
        self._device = own_device()
        self.routed: tuple[int, ...] | None = None
        """What the following forwards read, as `route` takes it; None is the base."""
        self._rows: mx.array | None = None
        """What all stacks read of it: the slot of each row, or that of all where a kernel is to know it."""
        self._one = device_numbers([ONE], mx.uint32)
        self._shared: dict[tuple[str, tuple[str, ...]], SharedInput] = {}
        """By block and the names of its layers that are given the same array."""

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
        if bundle.digest in self._filled:
            return self.nbytes
        capacity, in_use = self._capacity_for(self._free_slot()), self._in_use()
        total = 0
        for path in self._stacks.keys() | bundle.spec.modules.keys():
            stack, module = self._stacks.get(path), bundle.spec.modules.get(path)
            rank, gained = stack.shrunk(capacity, in_use)[1:] if stack else (0, False)
            rank = max(rank, round_rank(module.rank) if module else 0)
            gained = gained or (module is not None and bundle.spec.kind == "dora")
            out, width = self._own(path)
            values = rank * (round_width(out) + width)
            one = math.prod(experts_of(self._layers[path])) * values + (out if gained else 0)
            total += capacity * one * self._dtype.size
        return total

    @property
    def slots_in_use(self) -> int:
        return len(self._filled)

    def begin(self, version: AdapterBundle | PreparedBundle) -> Staging:
        """What `measure` and `write` take further, and `stage` completes. A bundle that was prepared elsewhere, for
        the model's dtype, is only copied. Gains are of the parameter set that is mounted now, and is again whenever
        `measure` is called. Raises `AdapterDoesNotFit` where a value leaves the range of that dtype, or where this
        device computes adapters on such layers wrongly."""
        bundle = version if isinstance(version, AdapterBundle) else version.bundle
        self._refuse_unfit(bundle)
        if not isinstance(version, PreparedBundle) or version.dtype != self._dtype_name:
            version = prepare(bundle, self._dtype_name)
        norms = (
            self._norms_for(path, bundle).begin(path, self._weights(path), delta)
            for path, delta in version.deltas.items()
        )
        own = own_part(version, self._cuts) if self._cuts else version
        return Staging(own, Gains(version, norms), written_beside(self.nbytes_with(bundle), self._device))

    def _refuse_unfit(self, bundle: AdapterBundle) -> None:
        targeted = {module.place for module in bundle.spec.modules.values()}
        if faults := [
            f"Adapters on {PLACES[place]} are not served here, because this device computes them wrongly, {why}. "
            "Push it with mode=merged, or leave these layers out."
            for place, why in self._unfit.items()
            if place in targeted
        ]:
            raise AdapterDoesNotFit(faults)

    def measure(self, staging: Staging, *, at_once: bool = False) -> bool:
        """Does a bounded part of what needs only the base, without waiting for it; true when nothing of it is left.

        Raises `AdapterDoesNotFit`, before anything is written, where a DoRA gain is not finite."""
        with staging.timed():
            return staging.digest in self._filled or staging.gains.measure(None if at_once else self._allowance)

    def bring(self, staging: Staging) -> None:
        """Has what `write` takes next copied to the device. After `measure`; a step may be in flight."""
        if staging.digest not in self._filled:
            with staging.timed():
                self._choose_slot(staging)
                staging.bring(self._stacks, self._capacity, self._dtype)

    def write(self, staging: Staging, seconds: float | None = None) -> bool:
        """Writes layers for about so long, or all of them; true when none is left. What it writes is evaluated, or
        dispatched where `written_beside`. Only after `measure`, and otherwise while no step is in flight."""
        if staging.digest in self._filled:
            return True
        began = self._clock()
        with staging.timed():
            self._choose_slot(staging)
            for stack in self._stacks.values():
                stack.rest()
            try:
                while not staging.written:
                    self._write(staging)
                    if seconds is not None and self._clock() - began >= seconds:
                        break
            finally:
                self._select(self.routed)
        return staging.written

    def stage(self, version: AdapterBundle | PreparedBundle | Staging) -> int:
        """The slot (1 and up) that holds the version, until it is released; does what is left of its staging.

        Raises `AdapterDoesNotFit`, before anything is written, where a value leaves the range of the model's dtype or
        a DoRA gain is not finite."""
        if not isinstance(version, Staging):
            digest = version.digest if isinstance(version, AdapterBundle) else version.bundle.digest
            if digest in self._filled:
                return self._filled[digest]
            version = self.begin(version)
        self.measure(version, at_once=True)
        self.write(version)
        if version.digest not in self._filled:
            if version.slot is None:
                raise RuntimeError("A version was written, but into no slot.")
            self._filled[version.digest] = version.slot
        return self._filled[version.digest]

    def release(self, digest: str) -> None:
        """Its slot is free. Raises `KeyError` for a digest that is not staged."""
        del self._filled[digest]
        self.routed = None

    def trim(self) -> None:
        """Gives back slots and ranks that the versions which are left do not need; with none left, all of them. Not
        while a version is being written; a step in flight keeps what it reads until it is done."""
        in_use = self._in_use()
        self._capacity = self._capacity_for(BASE_SLOT)
        try:
            for stack in self._stacks.values():
                stack.rest()
                stack.shrink(self._capacity, in_use)
        finally:
            self._select(self.routed)

    def slot(self, digest: str) -> int:
        """Where a staged bundle sits. Raises `KeyError` for a digest that is not staged."""
        return self._filled[digest]

    def route(self, slots: Sequence[int]) -> None:
        """Row i of every following forward uses slots[i]; 0 is the base. Raises `ValueError` for a free slot.

        Where all are equal the batch may have any size, else it must be that of `slots`."""
        free = set(slots) - self._in_use() - {BASE_SLOT}
        if free:
            raise ValueError(f"Slots {sorted(free)} hold no adapter version.")
        wanted = tuple(slots)
        self._select(wanted)
        self.routed = wanted

    def lent(self) -> tuple[tuple[tuple[str, str], ...], list[mx.array]]:
        """What the wrapped layers read as they are aimed now: the path and the fields of each stack that they read, and
        all their arrays. Hold them no longer than a forward: a write copies a stack that somebody holds."""
        lent = [(path, *stack.lent()) for path, stack in self._stacks.items()]
        arrays = [] if self._rows is None else [self._one if self._rows.size == 1 else self._rows]
        for *_, read in lent:
            arrays += read
        return tuple((path, fields) for path, fields, _ in lent if fields), arrays

    @contextmanager
    def reading(self, arrays: Sequence[mx.array]) -> Iterator[None]:
        """Within it every stack reads these arrays, in the order of `lent`, as while a forward is traced."""
        left = list(arrays)
        rows = None if self._rows is None else left.pop(0)
        with ExitStack() as stacks:
            for stack in self._stacks.values():
                stacks.enter_context(stack.reading(left, rows))
            yield

    def forget_inputs(self) -> None:
        """After a forward that broke off: what its layers shared is for no other."""
        for shared in self._shared.values():
            shared.forget()

    def unmount(self) -> None:
        """Put the bare layers back, by reference, and forget every version."""
        for path in self._stacks:
            parent, name = holder(self._model, self._wrapped_path(path))
            parent[name] = bare_layer(parent[name])
        self._stacks.clear()
        self._shared.clear()
        self._filled.clear()
        self.routed = None

    def _select(self, slots: tuple[int, ...] | None) -> None:
        slots = slots or (BASE_SLOT,)
        distinct = frozenset(slots)
        if len(distinct) == 1:
            (slot,) = distinct
            # One array for all layers: a device pays for each that comes from the host.
            self._rows = None if self._kernel is None else device_numbers([slot], mx.uint32)
            for stack in self._stacks.values():
                stack.select(slot, self._rows)
            return
        self._rows = device_numbers(slots, mx.uint32)
        for stack in self._stacks.values():
            stack.aim_rows(distinct, self._rows)

    def _choose_slot(self, staging: Staging) -> None:
        """A slot that is free, and stays so: versions are staged one after another."""
        if staging.slot is not None:
            return
        staging.slot = self._free_slot()
        self._capacity = self._capacity_for(staging.slot)
        for path in staging.prepared.factors:
            if path not in self._stacks:
                self._mount(path)
        staging.unwritten = deque(self._stacks)

    def _free_slot(self) -> int:
        taken = self._in_use()
        return next(slot for slot in range(1, len(taken) + 2) if slot not in taken)

    def _capacity_for(self, slot: int) -> int:
        needed = max(self._in_use() | {slot, FIRST_CAPACITY - 1}) + 1
        if needed > self._capacity:
            return max((self._capacity * 3 // 2 + 3) // 4 * 4, needed)
        return (needed + 3) // 4 * 4 if 2 * needed <= self._capacity else self._capacity

    def _in_use(self) -> set[int]:
        return set(self._filled.values())

    def _write(self, staging: Staging) -> None:
        """The next layers of a version, to about `WRITE_BYTES`. Those that it does not change get a clear slot."""
        slot, factors, gains = staging.slot, staging.prepared.factors, staging.gains.found
        if slot is None:
            raise RuntimeError("A version is written before it has a slot.")
        in_use = self._in_use()
        paths, given = staging.take(self._stacks, self._capacity, self._dtype)
        for path in paths:
            stack, new = self._stacks[path], factors.get(path)
            # Room for the slots in use and this one; what is twice too large, in slots or in rank, is given back.
            stack.shrink(self._capacity, in_use)
            stack.reserve(self._capacity, 0 if new is None else new.a.shape[-2])
            if new is None:
                stack.clear(slot)
            else:
                gain = self._gain(path, gains[path]) if path in gains else None
                stack.write(slot, next(given), next(given), gain)
        (mx.async_eval if staging.beside else mx.eval)([self._stacks[path].arrays() for path in paths])
        for path in paths:
            if path not in factors:
                self._stacks[path].filled.pop(slot, None)
            if path not in gains:
                self._stacks[path].gained.discard(slot)

    def _own(self, path: str) -> tuple[int, int]:
        """(out, in) of what this rank has of a layer."""
        return self._cuts[path].shape(self._layers[path]) if path in self._cuts else self._layers[path]

    def _gain(self, path: str, whole: NDArray[np.float32]) -> mx.array:
        own = self._cuts[path].gain(whole) if path in self._cuts else whole
        return on_device([cast(own, self._dtype_name)], self._dtype)[0]

    def _mount(self, path: str) -> SlotStack:
        place = place_of(self._layers[path])
        parent, name = holder(self._model, self._wrapped_path(path))
        kernel = self._kernel if place_of(self._layers[path]) == "linear" else None
        stack = SlotStack(self._capacity, 0, self._own(path), self._dtype, kernel)
        if place == "linear":
            kind = SummedLinear if isinstance(parent[name], CUT_INPUTS) else AdaptedLinear
            parent[name] = kind(parent[name], stack, self._shared_input(path) if kernel else None)
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

    def _shared_input(self, path: str) -> SharedInput | None:
        block, _, name = path.rpartition(".")
        for names in SHARE_AN_INPUT:
            if name in names:
                return self._shared.setdefault((block, names), SharedInput())
        return None

    def _weights(self, path: str) -> Rows:
        parent, name = holder(self._model, self._wrapped_path(path))
        place, layer = place_of(self._layers[path]), bare_layer(parent[name])
        if isinstance(layer, SplitEmbedding):
            layer = layer["head" if place == "tied_head" else "table"]
        return TableRows(layer) if place in ("embedding", "tied_embedding") else Rows(layer, self._cuts.get(path))

    def _norms_for(self, path: str, bundle: AdapterBundle) -> RowNorms:
        """A whole tensor of the bundle itself may stand in place of the base's weight."""
        return RowNorms() if self._weight_path(path) in bundle.spec.dense else self._norms

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
