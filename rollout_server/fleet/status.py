"""One status of many engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rollout_server.engine.messages.control import Pause
from rollout_server.engine.messages.status import EngineStatus, MemoryStatus, PrefixStatus, ReplicaStatus
from rollout_server.engine.messages.versions import PolicyStatus


def fleet_status(
    state: str,
    fault: str | None,
    waiting: int,
    policies: tuple[PolicyStatus, ...],
    paused: Pause | None,
    replicas: tuple[ReplicaStatus, ...],
    fewest: int,
    statuses: Sequence[EngineStatus],
) -> EngineStatus:
    """Sums of what replicas said last; counts are of those that run and of those that have ended."""

    def total(name: str) -> int:
        return sum(getattr(status, name) for status in statuses)

    prefixes = [status.prefix for status in statuses]
    memory = {part.name: sum(getattr(s.memory, part.name) for s in statuses) for part in fields(MemoryStatus)}
    return EngineStatus(
        state=state,
        fault=fault,
        waiting=waiting,
        running=total("running"),
        preempted=total("preempted"),
        preemptions=total("preemptions"),
        policies=policies,
        steps=total("steps"),
        tokens=total("tokens"),
        slot_bytes=total("slot_bytes"),
        set_bytes=total("set_bytes"),
        sets=total("sets"),
        prefix=PrefixStatus(
            any(prefix.on for prefix in prefixes),
            **{
                part.name: sum(getattr(prefix, part.name) for prefix in prefixes)
                for part in fields(PrefixStatus)
                if part.name != "on"
            },
        ),
        paused=paused.mode if paused else None,
        memory=MemoryStatus(**memory),
        replicas=replicas,
        fewest=fewest,
    )
