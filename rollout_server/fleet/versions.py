"""Versions of a fleet: the controller's registry says what there is, and a change is answered when all live replicas
have made it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from adapters.bundle import AdapterBundle, Content
from adapters.errors import RegistryError
from adapters.spec import Mode
from adapters.versions.registry import Change, Entry, Registry
from rollout_server.adapter_errors import as_ours
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
from rollout_server.engine.policies.entries import entry_of, facts_of, line_of, mode_of, status_of, version_of
from rollout_server.errors import BodyTooLarge, EngineUnavailable, RolloutError, UnknownPolicy
from rollout_server.fleet.codec.frames import LONGEST
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import ReplicaState, Version
from rollout_server.fleet.wire import AdoptVersion, DropVersion, FlipAlias, HeldVersion, StageVersion
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion, Span

log = logging.getLogger("rollout_server.fleet")

ONE_MODEL = ""
"""A fleet serves one base: its policies have no model's name before them."""
LARGEST = LONGEST - 2**20
"""Bytes of the largest version: it goes to a replica in one frame, with the names of its tensors."""


@dataclass(frozen=True, slots=True)
class _Staging:
    """What a replica is sent of a version, also one that comes later."""

    bundle: AdapterBundle
    mode: Mode
    dequantize: bool
    """Quantised layers may be unpacked."""
    ordinal: int
    """What was refused leaves its number to the next version, for which late answers to it must not be taken."""

    @property
    def content(self) -> Content:
        return Content(self.bundle.digest, self.mode)


class FleetVersions:
    """Belongs to the event loop; changes are made one at a time. `act` has the ledger's actions done, `send` carries a
    message to a replica, `fewest` replicas have to be live for a change."""

    def __init__(
        self,
        ledger: Ledger,
        send: Callable[[str, Any], None],
        act: Callable[[], None],
        keep: int | None,
        fewest: int,
        clock: Callable[[], float],
    ) -> None:
        self.base = PolicyVersion(BASE, 0, "")
        """Once a replica has said what it has loaded."""
        self._ledger = ledger
        self._send = send
        self._act = act
        self._fewest = fewest
        self._clock = clock
        self._registry = Registry(keep)
        self._bundles: dict[Version, _Staging] = {}
        self._ordinals = itertools.count(1)
        self._labels: dict[Version, str | None] = {}
        self._told: dict[Content, Published] = {}
        """What a replica said of staging it."""
        self._settled: dict[int, asyncio.Future[None]] = {}
        self._staging: set[Version] = set()
        """Versions that are not in the registry yet."""
        self._refused: dict[Version, RolloutError] = {}
        self._claims: dict[str, dict[Version, Content]] = {}
        """What replicas have from an earlier link, until they are told to keep it or to let it go."""
        self._all_restored = False
        self._turn = asyncio.Lock()

    # ---- what there is ----------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[PolicyStatus, ...]:
        return tuple(line_of(self._registry, name, ONE_MODEL, self._size) for name in self._registry.names)

    def _size(self, content: Content) -> int:
        told = self._told.get(content)
        return told.resident_bytes if told else 0

    def check(self, address: PolicyAddress) -> None:
        """Raises `UnknownPolicy` or `VersionGone` for what nobody has."""
        if address.name == BASE:
            if address.number or (address.digest and not self.base.digest.startswith(address.digest)):
                raise UnknownPolicy(f"The base has only version 0 ({self.base.digest}), not {address}.", param="policy")
            return
        with as_ours():
            self._registry.resolve(address.name, address.number, address.digest)

    def pinned(self, address: PolicyAddress) -> PolicyAddress:
        """The version that an address means now."""
        if address.name == BASE:
            return address
        with as_ours():
            return PolicyAddress(
                address.name, self._registry.resolve(address.name, address.number, address.digest).number
            )

    def hold(self, version: PolicyVersion, rows: int) -> bool:
        """Keeps a version for rows that began on it, so that it is there to draw them again."""
        if not version.number or not rows:
            return False
        try:
            self._registry.acquire(version.name, version.number, rows)
        except RegistryError:
            return False
        return True

    def labelled(self, version: PolicyVersion) -> PolicyVersion:
        """The version with the label that it has now: a push that changes nothing else tells no replica."""
        label = self._labels.get((version.name, version.number), version.label)
        return version if label == version.label else replace(version, label=label)

    def spans_labelled(self, spans: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple(replace(span, version=self.labelled(span.version)) for span in spans)

    def let_go(self, version: PolicyVersion, rows: int) -> None:
        """Ends `hold` for some rows; a version that nobody keeps is freed everywhere."""
        if self._registry.release(version.name, version.number, rows):
            self._free()

    # ---- the ledger's actions ---------------------------------------------------------------------------------------

    def stage_on(self, replica: str, version: Version) -> None:
        """What a replica has already is not sent again."""
        staging = self._bundles[version]
        name, number = version
        id = f"/stage/{staging.ordinal}/{number}/{name}"
        claimed = self._claims.get(replica, {}).pop(version, None)
        if claimed == staging.content:
            log.info("Replica %s has %s@%d already, so it is not sent again.", replica, name, number)
            self._send(replica, AdoptVersion(id, name, number))
            return
        if claimed is not None:
            self._send(replica, DropVersion(f"/drop/{number}/{name}", name, number))
        label, bundle = self._labels.get(version), staging.bundle
        self._send(replica, StageVersion(id, name, number, bundle, label, staging.mode, staging.dequantize))

    def flip_on(self, replica: str, version: Version) -> None:
        name, number = version
        self._send(replica, FlipAlias(f"/flip/{number}/{name}", name, number, self._labels.get(version)))

    def drop_on(self, replica: str, version: Version) -> None:
        """The live version of a name goes with all of it."""
        name, number = version
        left = any(kept == name for kept, _ in self._ledger.kept)
        self._send(replica, DropVersion(f"/drop/{number}/{name}", name, number if left else None))

    def settled(self, change: int) -> None:
        future = self._settled.pop(change, None)
        if future is not None and not future.done():
            future.set_result(None)

    def staging_of(self, id: str) -> Version | None:
        """The version that an answer is about; None where it is of one that was refused meanwhile, or is not kept any
        more."""
        _, _, ordinal, number, name = id.split("/", 4)
        staging = self._bundles.get((name, int(number)))
        return (name, int(number)) if staging is not None and staging.ordinal == int(ordinal) else None

    def staged_on(self, replica: str, version: Version, told: Published) -> None:
        self._told.setdefault(self._bundles[version].content, told)
        self._ledger.staged(replica, version)

    def refused(self, replica: str, version: Version, error: RolloutError) -> bool:
        """A replica cannot stage a version; returns whether that was known only now, by a change that is under way."""
        if not self._registry.numbered(*version):
            self._refused[version] = error
            self._ledger.drop([version])
            return True
        return False

    # ---- what replicas have already ---------------------------------------------------------------------------------

    def claim(self, replica: str, held: Iterable[HeldVersion]) -> None:
        """A replica that is about to join says what it has staged before."""
        self._claims[replica] = {(had.name, had.number): Content(had.digest, had.mode) for had in held}

    def unclaim(self, replica: str) -> None:
        """It has left."""
        self._claims.pop(replica, None)

    def let_claims_go(self) -> None:
        """Once all that the state directory has was restored, what nobody asked for is of no use."""
        if not self._all_restored:
            return
        for replica, claimed in self._claims.items():
            kept = {name for name, _ in self._ledger.kept}
            for name, number in claimed:
                # The live version of a name goes with all of it.
                self._send(replica, DropVersion(f"/drop/{number}/{name}", name, number if name in kept else None))
            claimed.clear()

    # ---- changes ----------------------------------------------------------------------------------------------------

    async def change(self, command: PolicyCommand) -> PolicyReply:
        """Makes a change everywhere. Raises what it may be refused with, and has changed nothing then, except where
        too few replicas are left after an alias has moved: asked for again, it is `unchanged`."""
        async with self._turn:
            self._all_restored = self._all_restored or not isinstance(command, Restore)
            with as_ours(command.name):
                match command:
                    case Publish():
                        return await self._publish(command)
                    case Activate():
                        return await self._activate(command)
                    case Pin():
                        change = self._registry.pin(command.name, command.number, command.pinned)
                        status = status_of(change.entry, ONE_MODEL, self._size(change.entry.content))
                        self._free()
                        return Pinned(command.id, status)
                    case Delete():
                        return self._delete(command)
                    case Export():
                        entry = self._registry.resolve(command.name, command.number)
                        bundle = self._bundles[entry.name, entry.number].bundle
                        return Exported(command.id, version_of(entry, ONE_MODEL), bundle)
                    case Restore():
                        return await self._restore(command)

    async def _publish(self, command: Publish) -> Published:
        name, bundle, mode = command.name, command.bundle, mode_of(command)
        known = self._registry.same(name, bundle.digest, mode)
        began = self._clock()
        if known is None:
            self._registry.require(name, command.if_match)
            self._require_enough()
            await self._stage((name, self._registry.last(name) + 1), bundle, mode, command.label, command.dequantize)
        staged = self._clock()
        change = self._registry.publish(
            name,
            bundle.digest,
            facts_of(bundle, mode),
            created=time.time(),
            activate=command.activate,
            label=command.label,
            if_match=command.if_match,
            provisional=command.provisional,
        )
        self._staging.discard((name, change.entry.number))
        if not command.provisional:
            version = (name, change.entry.number)
            self._labels[version] = change.entry.label
            if command.activate:
                await self._flip(version)
            self._free()
        return self._published(command.id, change, staged - began, self._clock() - staged)

    async def _stage(
        self, version: Version, bundle: AdapterBundle, mode: Mode, label: str | None, dequantize: bool
    ) -> None:
        if bundle.nbytes > LARGEST:
            raise BodyTooLarge(
                f"{version[0]}@{version[1]} has {bundle.nbytes:,} bytes, and a fleet sends its replicas versions of up "
                f"to {LARGEST:,}: push an adapter, or have one engine serve it.",
                param="weights",
            )
        self._bundles[version] = _Staging(bundle, mode, dequantize, next(self._ordinals))
        self._labels[version] = label
        self._staging.add(version)
        staged = False
        try:
            await self._settle(self._ledger.stage(version, bundle.nbytes, self._clock()))
            if (error := self._refused.pop(version, None)) is not None:
                raise error
            self._require_enough()
            staged = True
        finally:
            if not staged:
                self._staging.discard(version)
                self._free()

    async def _flip(self, version: Version) -> None:
        await self._settle(self._ledger.flip(version, self._clock()))
        self._require_enough()

    async def _settle(self, change: int) -> None:
        future = self._settled[change] = asyncio.get_running_loop().create_future()
        self._act()
        await future

    def _require_enough(self) -> None:
        live = len(self._ledger.in_state(ReplicaState.LIVE))
        if live < self._fewest:
            raise EngineUnavailable(
                f"{live} replicas are live, and versions change where at least {self._fewest} are (--min-replicas); "
                "try again in a moment."
            )

    async def _activate(self, command: Activate) -> Published:
        began = self._clock()
        self._require_enough()
        if command.check_only:
            entry = self._registry.resolve(command.name, command.number)
            self._registry.require(command.name, command.if_match)
            return self._published(command.id, Change(entry), 0.0, 0.0)
        change = self._registry.activate(command.name, command.number, command.if_match)
        await self._flip((command.name, command.number))
        self._free()
        return self._published(command.id, change, 0.0, self._clock() - began)

    def _delete(self, command: Delete) -> Deleted:
        name, number = command.name, command.number
        deletion = self._registry.delete_name(name) if number is None else self._registry.delete(name, number)
        self._free()
        return Deleted(
            command.id,
            name,
            self._registry.last(name),
            tuple(entry.number for entry in deletion.entries),
            sum(entry.in_use for entry in deletion.entries),
        )

    async def _restore(self, command: Restore) -> Restored:
        for version in command.versions:
            at = (command.name, version.number)
            await self._stage(at, version.bundle, version.mode, version.label, dequantize=True)
        entries = [entry_of(command.name, version) for version in command.versions]
        self._registry.restore(command.name, command.last, entries, command.gone)
        self._staging.clear()
        for entry in entries:
            if entry.live:
                await self._flip((entry.name, entry.number))
        self._free()
        return Restored(command.id, command.name)

    def _free(self) -> None:
        """Has every replica free what the registry does not keep."""
        kept = {(name, entry.number) for name in self._registry.names for entry in self._registry.versions(name)}
        gone = set(self._bundles) - kept - self._staging
        for version in gone:
            del self._bundles[version], self._labels[version]
        contents = {staging.content for staging in self._bundles.values()}
        self._told = {content: told for content, told in self._told.items() if content in contents}
        self._ledger.drop(gone)
        self._act()
        self.let_claims_go()

    def _published(self, id: str, change: Change, stage_s: float, activate_s: float) -> Published:
        entry: Entry = change.entry
        told = self._told.get(entry.content)
        return Published(
            id,
            version_of(entry, ONE_MODEL),
            entry.live,
            change.unchanged,
            1e3 * stage_s,
            1e3 * activate_s,
            entry.facts.mode,
            self._size(entry.content),
            changes=told.changes if told else {},
        )
