"""The engines behind a server's address."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from trainer_client.wire.call import Call
from trainer_client.wire.replies import Reply, need, need_objects, parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReplica:
    """One engine of a fleet."""

    id: str
    state: str
    """`joining`, `restoring`, `live`, `draining`, `fenced` or `dead`."""
    device: str | None
    pid: int | None
    """The process's id, where it runs on the server's machine."""
    rows: int
    """Rows that it was given and has not reported."""
    versions_staged: int
    last_seen_s: float
    """Seconds since its engine was heard of."""
    restarts: int


def fleet() -> Call[tuple[FleetReplica, ...]]:
    """The replicas; none where the server computes in its own process."""
    return Call(method="GET", path="/v1/fleet", parse=_parse, idempotent=True)


def drain_replica(id: str) -> Call[None]:
    """Gives a replica no more rows; it goes when it has none. Returns at once."""
    return Call(method="POST", path=f"/v1/fleet/{quote(id, safe='')}/drain", parse=_nothing, idempotent=True)


def restart_replica(id: str) -> Call[None]:
    """Gives a replica no more rows, and starts it anew when it has none. Returns at once."""
    return Call(method="POST", path=f"/v1/fleet/{quote(id, safe='')}/restart", parse=_nothing, idempotent=True)


def remove_replica(id: str) -> Call[None]:
    """Ends a replica at once; its rows are drawn again elsewhere."""
    return Call(method="DELETE", path=f"/v1/fleet/{quote(id, safe='')}", parse=_nothing, idempotent=True)


def _nothing(reply: Reply) -> None:
    parse_json(reply.body)


def _parse(reply: Reply) -> tuple[FleetReplica, ...]:
    entries = need_objects(parse_json(reply.body), "replicas")
    return tuple(
        FleetReplica(
            id=need(entry, "id", str),
            state=need(entry, "state", str),
            device=entry.get("device"),
            pid=entry.get("pid"),
            rows=need(entry, "rows", int),
            versions_staged=need(entry, "versions_staged", int),
            last_seen_s=float(need(entry, "last_seen_s", float)),
            restarts=need(entry, "restarts", int),
        )
        for entry in entries
    )
