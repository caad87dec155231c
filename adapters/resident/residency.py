"""Where versions are resident: low-rank ones in a slot of the stacks, merged and dense ones as a parameter set, an
adapter with whole layers beside it in both. Engine thread only; change it only while no dispatched step is in flight,
except where a version is `written_beside` it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn

from adapters.bundle import AdapterBundle, Content
from adapters.errors import AdapterDoesNotFit, QuantisedBase, WeightsFull
from adapters.kernels.low_rank import LowRankKernel
from adapters.placement import BASE_SET, BASE_SLOT, Placement
from adapters.prepare import PreparedBundle
from adapters.resident.cuts import Cut
from adapters.resident.parameter_sets import Build, NoRoom, ParameterSets
from adapters.resident.slots import AdapterSlots
from adapters.resident.staging import Staging
from adapters.spec import Parameter, Place

BUILD_S = 0.02
"""Seconds of each turn that may go to the weights of a parameter set while rows decode."""
WRITE_S = 0.005
"""Seconds of each turn that may go to writing a version into its slot while rows decode."""
NOT_CUT = (
    "Merged versions and those with whole tensors are not served by several ranks, each of which has a part of the "
    "weights. Push LoRA or DoRA with mode=adapter, or serve without --tensor-parallel."
)


@dataclass(slots=True)
class _Resident:
    placement: Placement
    bundle: AdapterBundle
    """What it was made of, to be exported."""
    references: int
    """Versions that have this content: the one count of who needs it."""
    changes: Mapping[str, float]


@dataclass(slots=True)
class _Work:
    """What was done so far for a version that is not staged yet."""

    prepared: PreparedBundle
    build: Build | None = None
    staging: Staging | None = None
    build_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.build_s + (self.staging.seconds if self.staging else 0.0)

    @property
    def changes(self) -> dict[str, float]:
        return (self.build.changes if self.build else {}) | (self.staging.gains.changes if self.staging else {})

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what is done inside for the parameter set; a `Staging` counts its own."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.build_s += time.perf_counter() - began


class ResidentVersions:
    """Versions by content; each `stage` of the same one is one more reference to it. `limit` is the most bytes that
    stacks and sets may take together, and `clock` says when the share of a turn is over, in seconds. `cuts` are those
    of layers that are cut over ranks."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, tuple[int, int]],
        parameters: Mapping[str, Parameter],
        dtype: mx.Dtype,
        limit: int | None = None,
        unfit: Mapping[Place, str] = MappingProxyType({}),
        kernel: LowRankKernel | None = None,
        clock: Callable[[], float] = time.monotonic,
        cuts: Mapping[str, Cut] = MappingProxyType({}),
    ) -> None:
        self.slots = AdapterSlots(model, layers, dtype, unfit, kernel, clock, cuts)
        self.sets = ParameterSets(model, layers, parameters, clock)
        self.limit = limit
        self._cuts = cuts
        self._residents: dict[Content, _Resident] = {}
        self._work: _Work | None = None

    @property
    def nbytes(self) -> int:
        return self.slots.nbytes + self.sets.nbytes

    def advance(self, prepared: PreparedBundle, settle: Callable[[], None], *, dequantize: bool, at_once: bool) -> bool:
        """Does a bounded part of what `stage` will want, or all but what only `stage` can do; true when nothing of it
        is left. One version at a time. A step may be in flight: unless the version is `written_beside` it, `settle` is
        called before a slot is written, and before this returns true.

        Raises what `stage` would, and the version begins anew."""
        if _content(prepared) in self._residents:
            return True
        work = self._take(prepared, dequantize=dequantize)
        beside = work.staging is not None and work.staging.beside
        self.sets.mount(BASE_SET)
        done = True
        if work.build is not None:
            # The slot of a version with both is left to `stage`, at once: its gains are of the layers of its own set,
            # which would have to be mounted between the steps of rows that run on others.
            with work.timed():
                done = self.sets.advance(work.build, math.inf if at_once else BUILD_S)
        elif work.staging is not None:
            # Products are dispatched and not waited for: the device has them while the next step is being built.
            done = self.slots.measure(work.staging, at_once=at_once)
            if done:
                self.slots.bring(work.staging)
                if not beside:
                    settle()
                done = self.slots.write(work.staging, None if at_once else WRITE_S)
        if done and not beside:
            settle()
        # Only now: what failed begins anew.
        self._work = work
        return done

    def abandon(self) -> None:
        """Forgets what `advance` did and nobody staged; the slot that it wrote is still free."""
        self._work = None
        self._trim_unused()  # Also after what failed in the middle: its stacks may have been made already.

    def trim(self) -> None:
        """Gives back what no version needs of the stacks, unless one is just being staged."""
        if self._work is None:
            self.slots.trim()

    def _trim_unused(self) -> None:
        # Not while there are versions: the next one of a trainer would need the room again.
        if not self.slots.slots_in_use:
            self.trim()

    def stage(self, prepared: PreparedBundle, *, dequantize: bool) -> float:
        """Makes a version ready to be routed to, and returns the seconds that were spent on it in all. Evaluates what
        was not done before, a layer at a time. No step may be in flight unless the version is
        `written_beside` it.

        Raises `AdapterDoesNotFit`, `QuantisedBase` unless `dequantize`, or `WeightsFull`, and has changed nothing."""
        content = _content(prepared)
        resident = self._residents.get(content)
        if resident is not None:
            resident.references += 1
            return 0.0
        work = self._take(prepared, dequantize=dequantize)
        parameters = self._finish_set(work)
        with ExitStack() as undo:
            undo.callback(self.sets.drop, parameters)
            slot = self._finish_slot(work, parameters)
            undo.pop_all()
        same = (other.bundle for known, other in self._residents.items() if known.digest == content.digest)
        # Equal bytes are held once, however they are served.
        bundle = next(same, prepared.bundle)
        self._residents[content] = _Resident(Placement(parameters, slot), bundle, 1, work.changes)
        return work.seconds

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
            self._trim_unused()

    def placement(self, content: Content) -> Placement:
        """Raises `KeyError` for what is not staged."""
        return self._residents[content].placement

    def bundle(self, content: Content) -> AdapterBundle:
        """What was staged. Raises `KeyError` for what is not."""
        return self._residents[content].bundle

    def changes(self, content: Content) -> Mapping[str, float]:
        """‖W' − W‖ of its DoRA modules and of its tensors in place of the base's. Raises `KeyError`."""
        return self._residents[content].changes

    def size(self, content: Content) -> int:
        """Device memory that a version takes: its parameter set and one slot."""
        placement = self._residents[content].placement
        slot = self.slots.slot_nbytes if placement.slot != BASE_SLOT else 0
        return self.sets.size(placement.parameters) + slot

    def route(self, parameters: int, slots: Sequence[int]) -> None:
        """The next forwards use this parameter set, and row i of them slots[i]."""
        if parameters != self.sets.mounted:
            self.sets.mount(parameters)
        wanted = tuple(slots)
        if wanted != self.slots.routed:
            self.slots.route(wanted)

    def _take(self, prepared: PreparedBundle, *, dequantize: bool) -> _Work:
        """What `advance` left of this version, or a start in which nothing is computed or written yet."""
        work, self._work = self._work, None
        if work is not None and _content(work.prepared) == _content(prepared):
            return work
        if self._cuts and _has_set(prepared):
            raise AdapterDoesNotFit([NOT_CUT])
        packed = [] if dequantize else self.sets.quantised(prepared)
        if packed:
            raise QuantisedBase(packed)
        if _has_set(prepared):
            if self.limit is not None:
                self.slots.trim()  # What nobody uses must not be the reason to refuse.
            room = None if self.limit is None else self.limit - self.nbytes
            return _Work(prepared, build=self.sets.begin(prepared, room))
        return _Work(prepared, staging=self._begin_slot(prepared) if _has_slot(prepared) else None)

    def _begin_slot(self, prepared: PreparedBundle, parameters: int = BASE_SET) -> Staging:
        total = self.slots.nbytes_with(prepared.bundle) + self.sets.nbytes
        if self.limit is not None and total > self.limit:
            raise WeightsFull(f"with it all of them would take {total} bytes")
        self.sets.mount(parameters)
        return self.slots.begin(prepared)

    def _finish_set(self, work: _Work) -> int:
        if work.build is None:
            return BASE_SET
        with work.timed():
            self.sets.advance(work.build, math.inf)
            try:
                return self.sets.finish(work.build)
            except NoRoom as error:
                raise WeightsFull(f"kept versions hold {self.nbytes} bytes") from error

    def _finish_slot(self, work: _Work, parameters: int) -> int:
        if not _has_slot(work.prepared):
            return BASE_SLOT
        if work.staging is None:
            work.staging = self._begin_slot(work.prepared, parameters)
            self.slots.measure(work.staging, at_once=True)
        # Layers are wrapped only around the base's own.
        self.sets.mount(BASE_SET)
        return self.slots.stage(work.staging)


def _content(prepared: PreparedBundle) -> Content:
    return Content(prepared.bundle.digest, prepared.mode)


def _has_set(prepared: PreparedBundle) -> bool:
    # A version that is nothing but a head runs on the base's own parameters.
    return bool(prepared.dense) or (prepared.mode == "merged" and bool(prepared.factors))


def _has_slot(prepared: PreparedBundle) -> bool:
    return prepared.mode == "adapter" and bool(prepared.factors)
