"""JSON of policies and their versions, as replies carry it."""

from __future__ import annotations

from typing import Any

from rollout_server.engine.messages.versions import PolicyStatus, VersionStatus


def policy_entry(policy: PolicyStatus) -> dict[str, Any]:
    return {
        "name": policy.name,
        "live": policy.live.number if policy.live else None,
        "versions": [version_status(version) for version in policy.versions],
    }


def version_status(status: VersionStatus) -> dict[str, Any]:
    return {
        "version": status.version.number,
        "digest": status.version.digest,
        "label": status.version.label,
        "kind": status.kind,
        "mode": status.mode,
        "live": status.live,
        "pinned": status.pinned,
        "rows_in_use": status.rows_in_use,
        "bytes": status.nbytes,
        "resident_bytes": status.resident_bytes,
        "created": status.created,
    }
