"""Between the registry's entries and what crosses the border about versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from adapters.bundle import AdapterBundle, Content
from adapters.errors import UnknownName
from adapters.spec import Mode
from adapters.versions.registry import Entry, Facts, Registry
from rollout_server.engine.messages.versions import (
    PolicyStatus,
    Publish,
    RestoredVersion,
    VersionStatus,
)
from rollout_server.rollout import PolicyVersion


def mode_of(command: Publish) -> Mode:
    return command.mode or command.bundle.spec.modes[0]


def facts_of(bundle: AdapterBundle, mode: Mode) -> Facts:
    own = bundle.spec
    return Facts(own.kind, mode, bundle.rank, bundle.parts, bundle.nbytes, own.task, bundle.labels)


def entry_of(name: str, version: RestoredVersion) -> Entry:
    return Entry(
        name=name,
        number=version.number,
        digest=version.bundle.digest,
        label=version.label,
        facts=facts_of(version.bundle, version.mode),
        created=version.created,
        live=version.live,
        pinned=version.pinned,
        in_use=0,
    )


def version_of(entry: Entry, resident: str) -> PolicyVersion:
    """`resident` is the model that it is a version of, as `EngineOptions` has it."""
    return PolicyVersion(entry.name, entry.number, entry.digest, entry.label, resident)


def status_of(entry: Entry, resident: str, resident_bytes: int) -> VersionStatus:
    facts = entry.facts
    return VersionStatus(
        version_of(entry, resident),
        facts.kind,
        facts.mode,
        facts.rank,
        facts.modules,
        entry.live,
        entry.pinned,
        entry.in_use,
        facts.nbytes,
        entry.created,
        resident_bytes,
        facts.task,
        facts.labels,
    )


@contextmanager
def naming(models: Sequence[str]) -> Iterator[None]:
    """Where there are several models, what is asked for may have been one of them: `UnknownName` says what there is."""
    try:
        yield
    except UnknownName as error:
        if not models:
            raise
        raise UnknownName(f"{error.message} The models here are {', '.join(models)}.") from error


def line_of(registry: Registry, name: str, resident: str, size: Callable[[Content], int]) -> PolicyStatus:
    """A name with all its kept versions; `size` gives what the content of one takes on the device, bytes."""
    live = registry.live(name)
    versions = tuple(status_of(entry, resident, size(entry.content)) for entry in registry.versions(name))
    return PolicyStatus(
        name, version_of(live, resident) if live else None, versions, registry.last(name), registry.gone(name)
    )
