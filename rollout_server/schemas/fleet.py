"""`GET /v1/fleet`, `POST /v1/fleet/{id}/drain`, `DELETE /v1/fleet/{id}`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ReplicaEntry(BaseModel):
    id: str
    state: Literal["joining", "restoring", "live", "draining", "fenced", "dead"]
    device: str | None = Field(description="Null until its model is loaded.")
    pid: int | None = Field(description="Of its process, where that runs on this machine.")
    rows: int = Field(description="Rows that it was given and has not reported.")
    versions_staged: int
    last_seen_s: float = Field(description="Seconds since its engine's thread was heard of.")
    restarts: int = Field(description="How often it was started again.")


class FleetReply(BaseModel):
    """Empty where the server computes in its own process."""

    replicas: list[ReplicaEntry]
    min_replicas: int = Field(description="So many have to be live for the server to be ready and versions to change.")


class LeaveReply(BaseModel):
    """`draining`: it finishes what it has; `removed`: its rows are drawn again elsewhere."""

    id: str
    state: Literal["draining", "removed"]
