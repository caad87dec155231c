"""The versions behind the scripted engine: the real registry, with bundles kept as they came and nothing computed."""

from __future__ import annotations

import hashlib

from adapters.bundle import AdapterBundle
from adapters.spec import Mode
from adapters.versions.registry import Change, Entry, Facts, Registry
from rollout_server.adapter_errors import as_ours
from rollout_server.engine.messages.scoring import Classified, Classify, ScorerHeld
from rollout_server.engine.messages.versions import (
    Activate,
    Delete,
    Deleted,
    Export,
    Exported,
    Pin,
    Pinned,
    PolicyStatus,
    Publish,
    Published,
    Restore,
    Restored,
    VersionStatus,
)
from rollout_server.engine.open_requests import HeldScorer
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion

BASE_DIGEST = "sha256:" + "b" * 64
FACTS = Facts("lora", "adapter", 2, 2, 64)


class FakeVersions:
    def __init__(self, keep_versions: int = 8) -> None:
        self.registry = Registry(keep_versions)
        self.published: list[Publish] = []
        self.restored: list[Restore] = []
        self.labels: tuple[str | None, ...] = ()
        self.held: list[str] = []
        """Scorers that were not let go yet."""
        self._bundles: dict[str, AdapterBundle] = {}

    # ---- what the engine's handle does ------------------------------------------------------------------------------

    async def publish(self, publish: Publish) -> Published:
        self.published.append(publish)
        bundle = publish.bundle
        with as_ours(publish.name):
            change = self.registry.publish(
                publish.name,
                bundle.digest,
                facts(bundle, publish.mode or "adapter"),
                created=1700000000.0,
                activate=publish.activate,
                label=publish.label,
                if_match=publish.if_match,
                provisional=publish.provisional,
            )
        self._bundles[bundle.digest] = bundle
        return published(publish.id, change, 0.0 if change.unchanged else 1.5, 0.0 if change.unchanged else 0.5)

    async def activate(self, activate: Activate) -> Published:
        with as_ours(activate.name):
            if activate.check_only:
                entry = self.registry.resolve(activate.name, activate.number)
                self.registry.require(activate.name, activate.if_match)
                return published(activate.id, Change(entry), 0.0, 0.0)
            change = self.registry.activate(activate.name, activate.number, activate.if_match)
        return published(activate.id, change, 0.0, 0.25)

    async def pin(self, pin: Pin) -> Pinned:
        with as_ours():
            return Pinned(pin.id, status(self.registry.pin(pin.name, pin.number, pin.pinned).entry))

    async def delete(self, delete: Delete) -> Deleted:
        name, number = delete.name, delete.number
        with as_ours():
            gone = self.registry.delete_name(name) if number is None else self.registry.delete(name, number)
        numbers = tuple(entry.number for entry in gone.entries)
        return Deleted(delete.id, name, self.registry.last(name), numbers, sum(entry.in_use for entry in gone.entries))

    async def export(self, export: Export) -> Exported:
        with as_ours():
            entry = self.registry.resolve(export.name, export.number)
        return Exported(export.id, version(entry), self._bundles[entry.digest])

    async def hold(self, owner: str, policy: PolicyAddress, *, elsewhere: bool = False) -> HeldScorer:
        held = ScorerHeld(self.new_id("hold"), self.find(policy.name, policy.number, policy.digest), self.labels)
        self.held.append(held.id)
        return HeldScorer(
            held, owner, self.new_id, lambda asked: self.classify(asked), lambda scorer: self.held.remove(scorer.id)
        )

    def new_id(self, kind: str) -> str:
        raise NotImplementedError

    async def classify(self, classify: Classify) -> Classified:
        raise NotImplementedError

    async def restore(self, restore: Restore) -> Restored:
        self.restored.append(restore)
        entries = []
        for kept in restore.versions:
            self._bundles[kept.bundle.digest] = kept.bundle
            entries.append(
                Entry(
                    restore.name,
                    kept.number,
                    kept.bundle.digest,
                    kept.label,
                    facts(kept.bundle, kept.mode),
                    kept.created,
                    kept.live,
                    kept.pinned,
                    0,
                )
            )
        self.registry.restore(restore.name, restore.last, entries, restore.gone)
        return Restored(restore.id, restore.name)

    # ---- what tests arrange and look at -----------------------------------------------------------------------------

    def add(self, name: str, count: int = 1) -> None:
        """`count` more versions of a name, the last one live."""
        for _ in range(count):
            number = self.registry.last(name) + 1
            digest = "sha256:" + hashlib.sha256(f"{name}/{number}".encode()).hexdigest()
            self.registry.publish(name, digest, FACTS, created=1700000000.0, label=f"step-{number}")

    def live(self, name: str) -> PolicyVersion:
        return self.find(name)

    def find(self, name: str, number: int | None = None, digest: str | None = None) -> PolicyVersion:
        if name == BASE:
            return PolicyVersion(BASE, 0, BASE_DIGEST)
        with as_ours():
            return version(self.registry.resolve(name, number, digest))

    def free(self, name: str, *numbers: int) -> None:
        for number in numbers:
            self.registry.delete(name, number)

    def snapshot(self) -> tuple[PolicyStatus, ...]:
        found = []
        for name in self.registry.names:
            live = self.registry.live(name)
            alias = version(live) if live else None
            kept = tuple(status(entry) for entry in self.registry.versions(name))
            found.append(PolicyStatus(name, alias, kept, self.registry.last(name), self.registry.gone(name)))
        return tuple(found)


def facts(bundle: AdapterBundle, mode: Mode) -> Facts:
    own = bundle.spec
    return Facts(own.kind, mode, bundle.rank, bundle.parts, bundle.nbytes, own.task, bundle.labels)


def version(entry: Entry) -> PolicyVersion:
    return PolicyVersion(entry.name, entry.number, entry.digest, entry.label)


def status(entry: Entry) -> VersionStatus:
    known = entry.facts
    return VersionStatus(
        version(entry),
        known.kind,
        known.mode,
        known.rank,
        known.modules,
        entry.live,
        entry.pinned,
        entry.in_use,
        known.nbytes,
        entry.created,
        task=known.task,
        labels=known.labels,
    )


def published(id: str, change: Change, stage_ms: float, activate_ms: float) -> Published:
    entry = change.entry
    return Published(id, version(entry), entry.live, change.unchanged, stage_ms, activate_ms, entry.facts.mode)
