"""What the state directory will say of a name once a change is done: worked out before, since it is written first.

Pure functions of what the engine shows. Rows that begin or end meanwhile may make it keep more or less; then the
record is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapters.versions.retention import GONE_TOLD, remember, surplus
from adapters.versions.store import NameRecord, VersionRecord
from rollout_server.engine.messages.versions import Delete, Pin, PolicyStatus, VersionStatus


def record_of(policy: PolicyStatus) -> NameRecord:
    """What the engine has of a name now."""
    return _record(policy, policy.versions, policy.live.number if policy.live else None)


def published(policy: PolicyStatus, number: int, keep: int, *, activate: bool, label: str | None) -> NameRecord:
    """The record once version `number` is published for good; it is there provisionally, or was there before."""
    versions = [
        replace(status, version=replace(status.version, label=label))
        if label is not None and status.version.number == number
        else status
        for status in policy.versions
    ]
    alias = policy.live.number if policy.live else None
    return _retained(policy, versions, number if activate else alias, keep)


def activated(policy: PolicyStatus, number: int, keep: int) -> NameRecord:
    return _retained(policy, policy.versions, number, keep)


def pinned(policy: PolicyStatus, pin: Pin, keep: int) -> NameRecord:
    versions = [
        replace(status, pinned=pin.pinned) if status.version.number == pin.number else status
        for status in policy.versions
    ]
    return _retained(policy, versions, policy.live.number if policy.live else None, keep)


def deleted(policy: PolicyStatus, delete: Delete) -> NameRecord | None:
    """The record once the version is deleted; None where the engine will refuse because it is live."""
    alias = policy.live.number if policy.live else None
    if delete.number is None:
        return _record(policy, (), None)
    if delete.number == alias:
        return None
    return _record(policy, [v for v in policy.versions if v.version.number != delete.number], alias)


def _retained(policy: PolicyStatus, versions: Sequence[VersionStatus], live: int | None, keep: int) -> NameRecord:
    """What the registry will keep of these, see `adapters.versions.retention.surplus`."""
    held = [v.version.number for v in versions if v.pinned or v.rows_in_use]
    gone = surplus([v.version.number for v in versions], keep, live, held)
    return _record(policy, [v for v in versions if v.version.number not in gone], live)


def _record(policy: PolicyStatus, versions: Sequence[VersionStatus], live: int | None) -> NameRecord:
    numbers = {status.version.number for status in versions}
    gone = dict.fromkeys(policy.gone)
    remember(gone, [v.version.digest for v in policy.versions if v.version.number not in numbers])
    records = tuple(
        VersionRecord(
            status.version.number,
            status.version.digest,
            status.mode,
            status.version.label,
            status.pinned,
            status.created,
        )
        for status in versions
    )
    return NameRecord(policy.name, policy.last, live, records, tuple(gone)[-GONE_TOLD:])
