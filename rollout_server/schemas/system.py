"""`/v1/models`, `/health`, `/ready`, and the body of every error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


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
