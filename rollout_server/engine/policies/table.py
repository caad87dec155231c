"""Which versions are live, staged and used by rows. Applied only between steps, on the engine thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from adapters.bundle import AdapterBundle, Content
from adapters.errors import AdapterDoesNotFit, RegistryError, WeightsFull
from adapters.placement import BASE_PLACEMENT, Placement
from adapters.prepare import PreparedBundle, prepare
from adapters.resident.residency import ResidentVersions
from adapters.resident.slots import AdapterSlots
from adapters.spec import Mode
from adapters.versions.registry import Change, Entry, Registry
from rollout_server.adapter_errors import as_ours
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.versions import (
    Activate,
    Delete,
    Deleted,
    Export,
    Exported,
    Pin,
    Pinned,
    PolicyCommand,
    PolicyReply,
    PolicyStatus,
    Publish,
    Published,
    Restore,
    Restored,
)
from rollout_server.engine.model.resident import VersionedModel
from rollout_server.engine.policies.entries import entry_of, facts_of, line_of, mode_of, naming, status_of, version_of
from rollout_server.engine.policies.scorers import Scorer, Scorers, require_purpose, samples_nothing, scores_nothing
from rollout_server.errors import AdapterMismatch, StalePolicy, UnknownPolicy, VersionGone
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion


class PolicyTable:
    """The registry of versions and what holds their weights. `base` is version 0, never freed. `clock`: seconds."""

    def __init__(
        self, model: VersionedModel, options: EngineOptions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        info = model.info
        self._model, self._models = options.resident, options.models
        self.base = PolicyVersion(BASE, 0, info.digest, resident=self._model)
        self._dtype, self._parameters, self._no_versions = info.dtype, info.weights, info.no_versions
        self._resident = ResidentVersions(
            model.module, info.layers, info.weights, model.dtype, options.weights_memory, info.unfit,
            model.adapter_kernel, clock, model.cuts,
        )  # fmt: skip
        self._registry = Registry(options.keep_versions)
        self._scorers = Scorers(info, model.head)
        self._prepared: PreparedBundle | None = None
        """The bundle of the push that is under way, where nobody prepared it before."""
        self._shown: tuple[PolicyStatus, ...] | None = None
        self.slot_bytes = self.set_bytes = 0
        """Device memory of all slots and sets; counted on a change, since it is asked for at every step."""
        self.sets: tuple[int, ...] = ()
        """Numbers of the parameter sets that are there, besides the base's; likewise."""

    # ---- rows -----------------------------------------------------------------------------------------------------

    def check(self, address: PolicyAddress) -> None:
        """Raises `UnknownPolicy` or `VersionGone` if nothing has this address now."""
        if address.name != BASE or address.number or address.digest:
            self._resolve(address)

    def acquire(
        self, address: PolicyAddress, rows: int, min_version: int | None, *, reads: bool = False
    ) -> tuple[PolicyVersion, Placement]:
        """The version an address means now and where it is, with one reference for each of `rows` rows. `reads`: only
        hidden states of it are wanted.

        Raises `UnknownPolicy`, `VersionGone` or `StalePolicy`, and `InvalidField` where the version has no output over
        the vocabulary and more than hidden states are wanted."""
        entry = self._resolve(address)
        if not reads and self.scores(entry):
            raise samples_nothing(version_of(entry, self._model) if entry else self.base)
        if min_version is not None:
            self.require(address, min_version)
        if entry is None:
            return self.base, BASE_PLACEMENT
        self._registry.acquire(entry.name, entry.number, rows)
        self._shown = None
        return version_of(entry, self._model), self._resident.placement(entry.content)

    def scorer(self, address: PolicyAddress) -> Scorer:
        """What gives label scores under this address now. Raises `UnknownPolicy`, `VersionGone`, or `InvalidField`
        where nothing does."""
        entry = self._resolve(address)
        found = self._scorers.base
        if entry is not None:
            found = self._scorers.of(entry.content, self._resident.bundle(entry.content))
        if found is None:
            raise scores_nothing(version_of(entry, self._model) if entry else self.base)
        return found

    def scores(self, entry: Entry | None) -> bool:
        """True where a version, None for the base, has a head in the place of an output over the vocabulary."""
        return self._scorers.base is not None or (entry is not None and entry.facts.task is not None)

    def samples(self, name: str) -> bool:
        """True where the live version of a name can go on with rows that run on another."""
        return not self.scores(self._registry.live(name) if name in self._registry.names else None)

    def placement(self, address: PolicyAddress) -> Placement:
        """Where a row of this address would run now; the base where there is nothing to run."""
        try:
            entry = self._resolve(address)
        except (UnknownPolicy, VersionGone):
            entry = None
        return self._resident.placement(entry.content) if entry else BASE_PLACEMENT

    def require(self, address: PolicyAddress, min_version: int) -> None:
        """Raises `StalePolicy` unless the alias has come that far; not retryable for the base, which never will."""
        alias = None if address.name == BASE else self._registry.live(address.name)
        number = alias.number if alias else 0
        if number < min_version:
            error = StalePolicy(
                f"min_version is {min_version}, but {address.name} is at version {number}.", param="min_version"
            )
            error.retryable = address.name != BASE
            raise error

    def behind(self, address: PolicyAddress, min_version: int) -> bool:
        """Returns whether a name has not come as far as that, but still may."""
        alias = self.alias(address.name)
        return alias is not None and alias < min_version

    def alias(self, name: str) -> int | None:
        """The number of the live version; None if there is none."""
        live = self._registry.live(name) if name in self._registry.names else None
        return live.number if live else None

    def acquire_again(self, version: PolicyVersion, rows: int) -> None:
        """More references to a version that is already held."""
        if version.number:
            self._shown = None
            self._registry.acquire(version.name, version.number, rows)

    def acquire_if_kept(self, version: PolicyVersion) -> bool:
        """One more reference to a version that rows ran on, unless it is gone."""
        try:
            self.acquire_again(version, 1)
        except RegistryError:
            return False
        return True

    def release(self, version: PolicyVersion, rows: int) -> None:
        """Gives references back; a version nothing keeps any more is freed."""
        if version.number and rows:
            self._shown = None
            self._free(self._registry.release(version.name, version.number, rows))

    def route(self, parameters: int, slots: Sequence[int]) -> None:
        """The next forwards use this parameter set, and row i of them slots[i]."""
        self._resident.route(parameters, slots)

    def router(self, parameters: int) -> Callable[[Sequence[int]], None]:
        """`route` for one parameter set, for whoever asks it every step."""
        return partial(self._resident.route, parameters)

    def route_rows(self, placements: Sequence[Placement]) -> None:
        """Row i of the next forwards is placed at placements[i]; all have the same `apart`."""
        self.route(placements[0].parameters, [placement.slot for placement in placements])

    @staticmethod
    def apart(placement: Placement) -> int:
        """Rows share a forward only if this is equal for them: one set of weights serves them all."""
        return placement.parameters

    @property
    def limit(self) -> int | None:
        """The most bytes that versions may take on the device."""
        return self._resident.limit

    @property
    def routed(self) -> AdapterSlots:
        """What adapter layers read as they are routed now, for `forward.compiled.CompiledDecode`."""
        return self._resident.slots

    # ---- versions -------------------------------------------------------------------------------------------------

    def change(self, command: PolicyCommand, settle: Callable[[], None], *, at_once: bool) -> PolicyReply | None:
        """Takes a change a bounded part further, or all the way; None while there is more to do. Rows run between two
        calls; `settle` is called before anything is written that a step in flight may read. Raises what a change may be
        refused with, and has changed nothing."""
        stages = self._stages(command)
        if stages and isinstance(command, Publish):
            if not self._advance(command, settle, at_once=at_once):
                return None
        elif stages:
            settle()
        return self._apply(command, stages=stages)

    def _stages(self, command: PolicyCommand) -> bool:
        """Returns whether a command will write into the slot arrays or the device's memory of parameter sets."""
        if isinstance(command, Publish):
            return self._known(command) is None
        return isinstance(command, Restore)

    def _known(self, command: Publish) -> Entry | None:
        """The version that a publish would leave as it is."""
        if command.number is not None:
            return self._registry.numbered(command.name, command.number)
        return self._registry.same(command.name, command.bundle.digest, mode_of(command))

    def _advance(self, command: Publish, settle: Callable[[], None], *, at_once: bool) -> bool:
        """Stages a bounded part of a push; whether nothing is left but what no row may run beside."""
        with as_ours(command.name):
            self._require(command)
            prepared = self._ready(command)
            return self._resident.advance(prepared, settle, dequantize=command.dequantize, at_once=at_once)

    def abandon(self) -> None:
        """Forgets the version that is being staged: its slot is still free, and nothing has its parameter set."""
        self._prepared = None
        self._resident.abandon()
        self._count()

    def _apply(self, command: PolicyCommand, *, stages: bool) -> PolicyReply:
        """Does what a command says, or raises and has changed nothing. No step may be in flight if it stages, but
        for what `ResidentVersions.advance` says."""
        self._shown = None
        with self._leaving_nothing(), as_ours(command.name):
            match command:
                case Publish():
                    return self._publish(command, stages=stages)
                case Activate():
                    return self._activate(command)
                case Pin():
                    return self._pin(command)
                case Delete():
                    return self._delete(command)
                case Export():
                    return self._export(command)
                case Restore():
                    return self._restore(command)

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.abandon()

    def _publish(self, command: Publish, *, stages: bool) -> Published:
        bundle = command.bundle
        stage_s = 0.0
        if stages:
            self._require(command)
            stage_s = self._stage(self._ready(command), dequantize=command.dequantize)
        staged = time.perf_counter()
        change = self._registry.publish(
            command.name,
            bundle.digest,
            facts_of(bundle, mode_of(command)),
            created=time.time(),
            activate=command.activate,
            label=command.label,
            if_match=command.if_match,
            provisional=command.provisional,
            number=command.number,
        )
        self._free(change.freed)
        return self._published(command.id, change, stage_s, time.perf_counter() - staged)

    def _require(self, command: Publish) -> None:
        """What a push can be refused with before anything is staged."""
        self._registry.require(command.name, command.if_match)
        if command.name in self._registry.names:
            require_purpose(command.name, command.bundle, self._registry.versions(command.name))

    def _activate(self, command: Activate) -> Published:
        began = time.perf_counter()
        if command.check_only:
            entry = self._registry.resolve(command.name, command.number)
            self._registry.require(command.name, command.if_match)
            return self._published(command.id, Change(entry), 0.0, 0.0)
        change = self._registry.activate(command.name, command.number, command.if_match)
        self._free(change.freed)
        return self._published(command.id, change, 0.0, time.perf_counter() - began)

    def _pin(self, command: Pin) -> Pinned:
        change = self._registry.pin(command.name, command.number, command.pinned)
        status = status_of(change.entry, self._model, self._resident.size(change.entry.content))
        self._free(change.freed)
        return Pinned(command.id, status)

    def _delete(self, command: Delete) -> Deleted:
        name, number = command.name, command.number
        deletion = self._registry.delete_name(name) if number is None else self._registry.delete(name, number)
        self._free(deletion.freed)
        return Deleted(
            command.id,
            name,
            self._registry.last(name),
            tuple(entry.number for entry in deletion.entries),
            sum(entry.in_use for entry in deletion.entries),
        )

    def _export(self, command: Export) -> Exported:
        entry = self._registry.resolve(command.name, command.number)
        return Exported(command.id, version_of(entry, self._model), self._resident.bundle(entry.content))

    def _restore(self, command: Restore) -> Restored:
        self._require_served()
        staged: list[Content] = []
        try:
            for version in command.versions:
                # What was served unpacked once may be so again: the base is the same.
                self._stage(version.prepared or self._prepare(version.bundle, version.mode), dequantize=True)
                staged.append(Content(version.bundle.digest, version.mode))
        except (AdapterDoesNotFit, WeightsFull):
            self._free(staged)
            raise
        entries = [entry_of(command.name, version) for version in command.versions]
        self._free(self._registry.restore(command.name, command.last, entries, command.gone))
        return Restored(command.id, command.name)

    def _published(self, id: str, change: Change, stage_s: float, activate_s: float) -> Published:
        entry = change.entry
        return Published(
            id,
            version_of(entry, self._model),
            entry.live,
            change.unchanged,
            1e3 * stage_s,
            1e3 * activate_s,
            entry.facts.mode,
            self._resident.size(entry.content),
            changes=self._resident.changes(entry.content),
        )

    def _prepare(self, bundle: AdapterBundle, mode: Mode) -> PreparedBundle:
        return prepare(bundle, self._dtype, mode=mode, parameters=self._parameters)

    def _require_served(self) -> None:
        if self._no_versions:
            sentence = f"No version can be served on this base: {self._no_versions}."
            raise AdapterMismatch(sentence, faults=(sentence,))

    def _ready(self, command: Publish) -> PreparedBundle:
        """Prepared once for all its turns, where that was not done before the engine's thread took it."""
        self._require_served()
        if command.prepared is not None:
            return command.prepared
        known = self._prepared
        if known is None or known.bundle is not command.bundle or known.mode != mode_of(command):
            known = self._prepared = self._prepare(command.bundle, mode_of(command))
        return known

    def _stage(self, prepared: PreparedBundle, *, dequantize: bool) -> float:
        """Completes what `advance` began, or does all; returns the seconds that took together."""
        seconds = self._resident.stage(prepared, dequantize=dequantize)
        self._count()
        return seconds

    def _free(self, contents: Sequence[Content]) -> None:
        if not contents:
            return
        for content in contents:
            self._resident.release(content)
        self._scorers.forget(contents)
        self._count()

    def trim(self) -> None:
        """Gives back what no version needs of the slots."""
        self._resident.trim()
        self._count()

    def _count(self) -> None:
        self.slot_bytes, self.set_bytes = self._resident.slots.nbytes, self._resident.sets.nbytes
        self.sets = self._resident.sets.numbers

    def _resolve(self, address: PolicyAddress) -> Entry | None:
        """None for the base."""
        if address.name == BASE:
            wrong = address.number or (address.digest and not self.base.digest.startswith(address.digest))
            if wrong:
                raise UnknownPolicy(f"The base has only version 0 ({self.base.digest}), not {address}.", param="policy")
            return None
        with as_ours(), naming(self._models):
            return self._registry.resolve(address.name, address.number, address.digest)

    # ---- status ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[PolicyStatus, ...]:
        """All names and kept versions; made again only after a change, since it is asked for at every step."""
        if self._shown is None:
            size, model = self._resident.size, self._model
            self._shown = tuple(line_of(self._registry, name, model, size) for name in self._registry.names)
        return self._shown
