"""Which versions are live, staged and used by rows. Applied only between steps, on the engine thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from adapters.bundle import AdapterBundle
from adapters.prepare import PreparedBundle
from adapters.registry import (
    Change,
    Entry,
    Facts,
    GoneVersion,
    LiveVersion,
    Mismatch,
    Registry,
    RegistryError,
)
from adapters.slots import BASE_SLOT, AdapterSlots
from adapters.spec import AdapterDoesNotFit
from adapters.staging import Staging
from rollout_server.engine.messages import (
    Activate,
    Delete,
    Deleted,
    EngineOptions,
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
    RestoredVersion,
    VersionStatus,
)
from rollout_server.engine.model import ResidentModel
from rollout_server.errors import (
    AdapterMismatch,
    Conflict,
    PreconditionFailed,
    StalePolicy,
    UnknownPolicy,
    VersionGone,
    WeightsMemoryExceeded,
)
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion

MODE = "adapter"
WRITE_S = 0.005
"""Of each turn, while rows decode, for writing a version into its slot."""


@dataclass(slots=True)
class _Held:
    """A bundle on the host, for exports; `versions` of equal content share it."""

    bundle: AdapterBundle
    versions: int


class PolicyTable:
    """The registry of versions and the slots that hold their weights. `base` is version 0 and never freed."""

    def __init__(
        self, base: PolicyVersion, slots: AdapterSlots, keep_versions: int, weights_memory: int | None
    ) -> None:
        self.base = base
        self._slots = slots
        self._registry = Registry(keep_versions)
        self._weights_memory = weights_memory
        self._bundles: dict[str, _Held] = {}
        self._staging: Staging | None = None
        self._shown: tuple[PolicyStatus, ...] | None = None
        self.slot_bytes = 0
        """Device memory of all slots; counted when one is written, since it is asked for at every step."""

    @classmethod
    def start(cls, model: ResidentModel, options: EngineOptions) -> PolicyTable:
        base = PolicyVersion(BASE, 0, model.info.digest)
        slots = AdapterSlots(model.module, model.info.layers, model.dtype)
        return cls(base, slots, options.keep_versions, options.weights_memory)

    # ---- rows -----------------------------------------------------------------------------------------------------

    def check(self, address: PolicyAddress) -> None:
        """Raises `UnknownPolicy` or `VersionGone` if nothing has this address now."""
        if address.name != BASE or address.number or address.digest:
            self._resolve(address)

    def acquire(self, address: PolicyAddress, rows: int, min_version: int | None) -> tuple[PolicyVersion, int]:
        """The version an address means now and its slot, with one reference for each of `rows` rows.

        Raises `UnknownPolicy`, `VersionGone` or `StalePolicy`."""
        entry = self._resolve(address)
        if min_version is not None:
            self._require_version(address, min_version)
        if entry is None:
            return self.base, BASE_SLOT
        self._registry.acquire(entry.name, entry.number, rows)
        self._shown = None
        return _version(entry), self._slots.slot(entry.digest)

    def _require_version(self, address: PolicyAddress, min_version: int) -> None:
        """Raises `StalePolicy` unless the alias has come that far; for the base it never will."""
        alias = None if address.name == BASE else self._registry.live(address.name)
        number = alias.number if alias else 0
        if number < min_version:
            error = StalePolicy(
                f"min_version is {min_version}, but {address.name} is at version {number}.", param="min_version"
            )
            error.retryable = address.name != BASE
            raise error

    def alias(self, name: str) -> int | None:
        """The number of the live version; None if there is none."""
        live = self._registry.live(name) if name in self._registry.names else None
        return live.number if live else None

    def acquire_again(self, version: PolicyVersion, rows: int) -> None:
        """More references to a version that is already held."""
        if version.number:
            self._shown = None
            self._registry.acquire(version.name, version.number, rows)

    def release(self, version: PolicyVersion, rows: int) -> None:
        """Gives references back; a version nothing keeps any more is freed."""
        if version.number and rows:
            self._shown = None
            self._free(self._registry.release(version.name, version.number, rows))

    def route(self, slots: Sequence[int]) -> None:
        """Row i of the next forwards uses slots[i]."""
        self._slots.route(slots)

    # ---- versions -------------------------------------------------------------------------------------------------

    def stages(self, command: PolicyCommand) -> bool:
        """Whether a command will write into the slot arrays."""
        if isinstance(command, Publish):
            return self._registry.same(command.name, command.bundle.digest, MODE) is None
        return isinstance(command, Restore)

    def advance(self, command: PolicyCommand, settle: Callable[[], None], *, at_once: bool) -> bool:
        """Takes a push a bounded part further, or all the way; true when `apply` has nothing long to do. `settle` is
        called first: no step may be in flight. Raises what `apply` would, and has changed nothing."""
        if not isinstance(command, Publish) or not self.stages(command):
            return True
        with _as_ours():
            staging = self._staging
            if staging is None or staging.digest != command.bundle.digest:
                self._registry.require(command.name, command.if_match)
                self._require_memory(command.bundle)
                staging = self._staging = self._slots.begin(command.prepared or command.bundle)
            settle()
            # Products are dispatched and not waited for: the device has them while the next step is being built.
            if not self._slots.measure(staging, at_once=at_once):
                return False
            return self._slots.write(staging, None if at_once else WRITE_S)

    def abandon(self) -> None:
        """Forgets the version that is being staged; its slot is still free."""
        self._staging = None

    def apply(self, command: PolicyCommand) -> PolicyReply:
        """Does what a command says, or raises and has changed nothing. No step may be in flight if it `stages`."""
        self._shown = None
        with _as_ours():
            match command:
                case Publish():
                    return self._publish(command)
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

    def _publish(self, command: Publish) -> Published:
        bundle = command.bundle
        stage_s = 0.0
        if self.stages(command):
            self._registry.require(command.name, command.if_match)
            self._require_memory(bundle)
            stage_s = self._stage(bundle, command.prepared)
        staged = time.perf_counter()
        change = self._registry.publish(
            command.name,
            bundle.digest,
            _facts(bundle),
            created=time.time(),
            activate=command.activate,
            label=command.label,
            if_match=command.if_match,
        )
        self._free(change.freed)
        return self._published(command.id, change, stage_s, time.perf_counter() - staged)

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
        self._free(change.freed)
        return Pinned(command.id, _status(change.entry))

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
        return Exported(command.id, _version(entry), self._bundles[entry.digest].bundle)

    def _restore(self, command: Restore) -> Restored:
        staged: list[str] = []
        try:
            for version in command.versions:
                self._require_memory(version.bundle, beside=staged)
                self._stage(version.bundle, version.prepared)
                staged.append(version.bundle.digest)
        except (AdapterDoesNotFit, WeightsMemoryExceeded):
            self._free(staged)
            raise
        entries = [_entry(command.name, version) for version in command.versions]
        self._free(self._registry.restore(command.name, command.last, entries))
        return Restored(command.id, command.name)

    @staticmethod
    def _published(id: str, change: Change, stage_s: float, activate_s: float) -> Published:
        return Published(
            id, _version(change.entry), change.entry.live, change.unchanged, 1e3 * stage_s, 1e3 * activate_s
        )

    def _require_memory(self, bundle: AdapterBundle, beside: Sequence[str] = ()) -> None:
        """`beside` are digests that are staged, but of no version yet."""
        if self._weights_memory is None:
            return
        held = self._registry.nbytes + sum(self._bundles[digest].bundle.nbytes for digest in beside)
        if held + bundle.nbytes > self._weights_memory:
            raise WeightsMemoryExceeded(
                f"The adapter has {bundle.nbytes} bytes and {held} are held by kept versions; --weights-memory "
                f"is {self._weights_memory}. Nothing changed; keep fewer versions (--keep-versions) or allow more."
            )

    def _stage(self, bundle: AdapterBundle, prepared: PreparedBundle | None = None) -> float:
        """Completes what `advance` began, or does all; returns the seconds that took together."""
        staging, self._staging = self._staging, None
        if staging is None or staging.digest != bundle.digest:
            staging = self._slots.begin(prepared or bundle)
        self._slots.stage(staging)
        self.slot_bytes = self._slots.nbytes
        self._bundles.setdefault(bundle.digest, _Held(bundle, 0)).versions += 1
        return staging.seconds

    def _free(self, digests: Sequence[str]) -> None:
        for digest in digests:
            self._slots.release(digest)
            held = self._bundles[digest]
            held.versions -= 1
            if not held.versions:
                del self._bundles[digest]

    def _resolve(self, address: PolicyAddress) -> Entry | None:
        """None for the base."""
        if address.name == BASE:
            wrong = address.number or (address.digest and not self.base.digest.startswith(address.digest))
            if wrong:
                raise UnknownPolicy(f"The base has only version 0 ({self.base.digest}), not {address}.", param="policy")
            return None
        with _as_ours():
            return self._registry.resolve(address.name, address.number, address.digest)

    # ---- status ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[PolicyStatus, ...]:
        """All names and kept versions; made again only after a change, since it is asked for at every step."""
        if self._shown is None:
            self._shown = tuple(self._line(name) for name in self._registry.names)
        return self._shown

    def _line(self, name: str) -> PolicyStatus:
        live = self._registry.live(name)
        versions = tuple(_status(entry) for entry in self._registry.versions(name))
        return PolicyStatus(name, _version(live) if live else None, versions, self._registry.last(name))


def _facts(bundle: AdapterBundle) -> Facts:
    return Facts(bundle.spec.kind, MODE, bundle.rank, len(bundle.spec.modules), bundle.nbytes)


def _entry(name: str, version: RestoredVersion) -> Entry:
    return Entry(
        name=name,
        number=version.number,
        digest=version.bundle.digest,
        label=version.label,
        facts=_facts(version.bundle),
        created=version.created,
        live=version.live,
        pinned=version.pinned,
        in_use=0,
    )


def _version(entry: Entry) -> PolicyVersion:
    return PolicyVersion(entry.name, entry.number, entry.digest, entry.label)


def _status(entry: Entry) -> VersionStatus:
    facts = entry.facts
    return VersionStatus(
        _version(entry),
        facts.kind,
        facts.mode,
        facts.rank,
        facts.modules,
        entry.live,
        entry.pinned,
        entry.in_use,
        facts.nbytes,
        entry.created,
    )


@contextmanager
def _as_ours() -> Iterator[None]:
    """The adapters' own errors in the words of the one tree the server speaks."""
    try:
        yield
    except GoneVersion as error:
        raise VersionGone(error.message, param="policy") from error
    except LiveVersion as error:
        raise Conflict(error.message, param="version") from error
    except Mismatch as error:
        raise PreconditionFailed(error.message, param="If-Match") from error
    except RegistryError as error:
        raise UnknownPolicy(error.message, param="policy") from error
    except AdapterDoesNotFit as error:
        raise AdapterMismatch(str(error), faults=error.faults) from error
