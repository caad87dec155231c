"""`/v1/models`, `/v1/fleet`, `/health`, `/ready`, and the body of every error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ModelCard(BaseModel):
    """`kv_bits` is 8 where keys and values are kept in so many bits, and null where as the model computed them.
    `labels` are the names of what a head scores, null for one without a name; without a head there are none.
    `vision`: its prompts may show pictures."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    vocab_size: int
    dtype: str
    quantization: dict[str, Any] | None
    kv_bits: int | None
    eos_token_ids: list[int]
    digest: str
    task: Literal["generate", "classify", "token_classify", "embed"]
    labels: list[str | None]
    vision: bool


class ModelsReply(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class EngineHealth(BaseModel):
    """`waiting` counts requests, `running` rows; `steps` and `tokens` since the start; `paused` is its mode or null."""

    model: str
    """`base`, or the name of another model."""
    state: str
    waiting: int
    running: int
    steps: int
    tokens: int
    paused: Literal["wait", "keep", "abort"] | None


class HealthReply(EngineHealth):
    """Counts are those of all models together; `models` has them one by one, the base first."""

    status: Literal["ok"]
    instance: str
    models: list[EngineHealth]


class ReadyReply(BaseModel):
    status: Literal["ready"]
    instance: str


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    retryable: bool
    faults: list[str] | None = None
    policy: str | None = None
    version: int | None = None
    digest: str | None = None


class ErrorReply(BaseModel):
    error: Problem


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
    """`draining`: it finishes what it has; `restarting`: the same, and it comes back; `removed`: its rows are drawn
    again elsewhere."""

    id: str
    state: Literal["draining", "restarting", "removed"]
