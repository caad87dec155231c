"""`POST /v1/logprobs`: teacher forcing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from rollout_server.schemas.fields import PolicyText, Request, TokenIds, Whole
from rollout_server.schemas.messages import ImageUrls
from rollout_server.schemas.rollouts import BaseState, PolicyState, SpanReply
from rollout_server.schemas.spans import SpanToRead


class SequenceToScore(Request):
    token_ids: Annotated[TokenIds, Field(min_length=1)]
    start: Whole = 0
    images: ImageUrls | None = None
    versions: Annotated[list[SpanToRead], Field(min_length=1)] | None = Field(
        default=None,
        description="Spans that tile the positions from `start` on, counted from there: each is read under its own "
        "version, on the KV that stands (`carried`, or no `kv`) or after reading everything before it again "
        "(`recomputed`). What stands before `start` is read under the first. Without them all is read under `policy`.",
    )


class LogprobsRequest(Request):
    policy: PolicyText
    sequences: Annotated[list[SequenceToScore], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=1e-3, le=100)] = Field(default=1.0, description="Divides the logits first.")
    returns: list[Literal["entropy"]] = Field(default_factory=list, alias="return")
    top_logprobs: Whole = 0


# ---- replies ------------------------------------------------------------------------------------------------------


class VersionReply(BaseModel):
    policy: str
    version: int
    digest: str
    label: str | None


class ScoredSequenceReply(BaseModel):
    """Values for positions `start…`; position 0 is null."""

    logprobs: list[float | None]
    versions: list[SpanReply]
    entropy: list[float | None] | None
    top_logprobs: list[list[tuple[int, float | None]] | None] | None


class LogprobsReply(BaseModel):
    sequences: list[ScoredSequenceReply]
    policy: PolicyState
    versions: list[VersionReply]
    temperature: float
    base: BaseState
    instance: str
