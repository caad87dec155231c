"""Parameter sets: what a merged or dense version has in place of the base's parameters, held by reference.

A set names only the arrays and layers that differ. Mounting one puts references into the model, unmounting puts the
base's own objects back: nothing is ever subtracted, and the base's arrays are never written. Engine thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from adapters.errors import AdapterDoesNotFit
from adapters.faults import Fault
from adapters.numerics import unless_rounding
from adapters.placement import BASE_SET
from adapters.prepare import PreparedBundle
from adapters.resident.layers.expert_product import ExpertLinear
from adapters.resident.merge import base_weight, merged_weights
from adapters.resident.model_layers import bare_holder
from adapters.spec import TIED_HEAD, Parameter, place_of

TIED_WEIGHT = f"{TIED_HEAD}.weight"


class NoRoom(Exception):
    """A set would exceed the bytes it may have; nothing was changed."""


@dataclass(frozen=True, slots=True, eq=False)
class Swap:
    """One reference: `holder[key]` is `base` while the base is mounted, and `own` while the set is."""

    holder: Any
    key: str | int
    base: Any
    own: Any


@dataclass(frozen=True, slots=True, eq=False)
class ParameterSet:
    arrays: tuple[Swap, ...]
    layers: tuple[tuple[str, nn.Module], ...]
    """Path → layer of another class than the base's, put where the base's layer hangs when the set is mounted."""
    nbytes: int


@dataclass(slots=True, eq=False)
class Build:
    """A set on its way."""

    prepared: PreparedBundle
    room: int | None
    weights: Iterator[tuple[str, mx.array]]
    own: dict[str, mx.array] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=dict)
    """‖W' − W‖ of DoRA modules and of tensors in place of the base's, which the file alone does not tell."""

    @property
    def exceeds(self) -> bool:
        return self.room is not None and sum(array.nbytes for array in self.own.values()) > self.room


class SplitEmbedding(nn.Module):
    """An embedding, and the head that shared its weight, with a layer each."""

    def __init__(self, table: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.table = table
        self.head = head
        self.eval()

    def __call__(self, tokens: mx.array) -> mx.array:
        return self["table"](tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        return self["head"].as_linear(x)


class ParameterSets:
    """The sets of one model, by number; 0 is the base and always there. `layers` and `parameters` are what
    `model_layers.adaptable_layers` and `model_layers.replaceable_parameters` say of it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[int, int]],
        parameters: Mapping[str, Parameter],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._clock = clock
        self._layers = layers
        self._parameters = parameters
        self._sets: dict[int, ParameterSet] = {}
        self.mounted = BASE_SET
        """The set that the next forwards use."""
        self._undo: list[Swap] = []
        self._last = BASE_SET
        self._tied = next((path for path, shape in layers.items() if place_of(shape) == "tied_embedding"), None)

    @property
    def nbytes(self) -> int:
        return sum(own.nbytes for own in self._sets.values())

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the sets that are there, besides the base."""
        return tuple(self._sets)

    def size(self, number: int) -> int:
        """Device memory of a set, bytes."""
        return self._sets[number].nbytes if number else 0

    def quantised(self, prepared: PreparedBundle) -> list[str]:
        """Packed parameters of the base that the version would have unpacked."""
        return [path for path in touched(prepared) if self._parameters[path].quantised]

    def begin(self, prepared: PreparedBundle, room: int | None = None) -> Build:
        """The start of a set; nothing is computed yet. `room` is how many bytes it may have."""
        weights = merged_weights(self._model, self._layers, self._parameters, prepared)
        return Build(prepared, room, weights)

    def advance(self, build: Build, seconds: float) -> bool:
        """Computes further parameters, one after another, until this much time is over; True when all are done or it
        is known that the set cannot be. Mounts the base."""
        self.mount(BASE_SET)
        end = self._clock() + seconds
        for path, array in build.weights:
            mx.eval(array)
            if not bool(mx.all(mx.isfinite(array))):
                build.faults.append(_outside(path, array.dtype))
            else:
                if not self._is_base(path, array):
                    build.own[path] = array
                self._measure(build, path, array)
            if build.exceeds:
                return True
            if self._clock() > end:
                return False
        return True

    def finish(self, build: Build) -> int:
        """The number of a new set, never given before; 0 where nothing differs from the base to the bit.

        Raises `AdapterDoesNotFit` where a merged value leaves the range of its parameter, and `NoRoom`."""
        self.mount(BASE_SET)
        if build.exceeds:
            raise NoRoom
        if build.faults:
            raise AdapterDoesNotFit(build.faults)
        if not build.own:
            return BASE_SET
        own = self._assemble(build.own, build.prepared)
        self._last += 1
        self._sets[self._last] = own
        return self._last

    def drop(self, number: int) -> None:
        """Lets a set go; the base is mounted if this one was."""
        if self.mounted == number:
            self.mount(BASE_SET)
        self._sets.pop(number, None)

    def mount(self, number: int) -> None:
        """The next forwards use this set. Raises `KeyError` for one that is not there, and changes nothing."""
        if number == self.mounted:
            return
        own = self._sets[number] if number else None
        for swap in reversed(self._undo):
            swap.holder[swap.key] = swap.base
        self._undo, self.mounted = [], BASE_SET
        if own is None:
            return
        # Layers are looked up now: an adapter may have been wrapped around them since the set was built.
        for path, layer in own.layers:
            holder, key = bare_holder(self._model, path)
            self._undo.append(Swap(holder, key, holder[key], layer))
            holder[key] = layer
        for swap in own.arrays:
            swap.holder[swap.key] = swap.own
        self._undo += own.arrays
        self.mounted = number

    def _measure(self, build: Build, path: str, array: mx.array) -> None:
        bundle, layer = build.prepared.bundle, path.removesuffix(".weight")
        module = build.prepared.mode == "merged" and bundle.spec.kind == "dora" and layer in bundle.spec.modules
        if not module and (path not in bundle.spec.dense or bundle.spec.kind == "delta"):
            return
        norm = 0.0
        if path in build.own:
            real = self._real(path)
            weight = base_weight(self._model, real, self._parameters[real])
            change = mx.linalg.norm((array.astype(mx.float32) - weight).reshape(-1))
            zero = module and bundle.measures[layer].zero
            norm = unless_rounding(float(change), float(mx.linalg.norm(weight.reshape(-1))), zero=zero)
        build.changes[layer if module else path] = norm

    def _is_base(self, path: str, array: mx.array) -> bool:
        if self._parameters[path].quantised:
            return False
        holder, key = bare_holder(self._model, self._real(path))
        base = holder[key]
        return base.dtype == array.dtype and bool(mx.array_equal(_bits(base), _bits(array)))

    def _real(self, path: str) -> str:
        """Where the base has a parameter: a tied head's is the embedding's."""
        return f"{self._tied}.weight" if self._tied and path == TIED_WEIGHT else path

    def _assemble(self, own: dict[str, mx.array], prepared: PreparedBundle) -> ParameterSet:
        nbytes = sum(array.nbytes for array in own.values())
        layers: dict[str, nn.Module] = {}
        if self._tied is not None:
            nbytes -= self._split_tied(own, layers, prepared)
        for path in [path for path in own if self._parameters[path].quantised]:
            layer = path.removesuffix(".weight")
            layers[layer] = _unpacked(self._module(layer), own.pop(path), own.pop(f"{layer}.bias", None))
        arrays = []
        for path, array in own.items():
            holder, key = bare_holder(self._model, path)
            arrays.append(Swap(holder, key, holder[key], array))
        return ParameterSet(tuple(arrays), tuple(layers.items()), nbytes)

    def _split_tied(self, own: dict[str, mx.array], layers: dict[str, nn.Module], prepared: PreparedBundle) -> int:
        """Takes the embedding and the head that shares its weight out of `own` where they part, and returns how many
        bytes were there twice."""
        weight = f"{self._tied}.weight"
        table, head = own.get(weight), own.get(TIED_WEIGHT)
        if not _parts_head(prepared, self._tied or ""):
            return 0
        if table is not None and head is not None and mx.array_equal(_bits(table), _bits(head)):
            own.pop(TIED_WEIGHT)
            return head.nbytes
        if table is None and head is None:
            return 0
        base = self._module(self._tied or "")
        halves = [base if array is None else _embedding(array) for array in (table, head)]
        layers[self._tied or ""] = SplitEmbedding(*halves)
        own.pop(weight, None)
        own.pop(TIED_WEIGHT, None)
        return 0

    def _module(self, path: str) -> nn.Module:
        holder, key = bare_holder(self._model, path)
        module: nn.Module = holder[key]
        return module


def touched(prepared: PreparedBundle) -> Iterator[str]:
    """Parameters that a version would have of its own, but for those that turn out equal to the base's."""
    yield from prepared.dense
    if prepared.mode == "merged":
        for path in prepared.bundle.spec.modules:
            if f"{path}.weight" not in prepared.dense:
                yield f"{path}.weight"


def _parts_head(prepared: PreparedBundle, tied: str) -> bool:
    """Returns whether the head that shares the embedding's weight no longer does: a low-rank part changes one of the
    two, and a whole tensor in place of the embedding's takes the head along unless there is one for it."""
    merged = prepared.bundle.spec.modules.keys() if prepared.mode == "merged" else set()
    return TIED_WEIGHT in prepared.dense or tied in merged or TIED_HEAD in merged


def _bits(array: mx.array) -> mx.array:
    return array.view({4: mx.uint32, 2: mx.uint16}[array.dtype.size])


def _embedding(weight: mx.array) -> nn.Embedding:
    layer = nn.Embedding(1, 1)
    layer["weight"] = weight
    return layer


def _outside(path: str, dtype: mx.Dtype) -> Fault:
    return Fault(
        f"{path}: merged, it leaves the range of {dtype}, that of this parameter.",
        f"parameters leave the range of {dtype}, which is theirs, once merged",
        path,
    )


def _unpacked(base: nn.Module, weight: mx.array, bias: mx.array | None) -> nn.Module:
    """The layer that the quantised one would be with a plain weight; its bias is the base's unless one is given."""
    layer: nn.Module
    if isinstance(base, nn.QuantizedEmbedding):
        return _embedding(weight)
    if isinstance(base, QuantizedSwitchLinear):
        layer = ExpertLinear(1, 1, 1, bias=False)
    elif isinstance(base, nn.QuantizedLinear):
        layer = nn.Linear(1, 1, bias=False)
    else:
        raise AdapterDoesNotFit([f"A quantised {type(base).__name__} has no form with a plain weight here."])
    layer["weight"] = weight
    if bias is not None or "bias" in base:
        layer["bias"] = base["bias"] if bias is None else bias
    return layer.eval()
