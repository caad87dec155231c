"""`POST /v1/abort`, `/v1/pause`, `/v1/resume`, `/v1/release`, and vLLM's `/pause`, `/resume`, `/is_paused`,
`/reset_prefix_cache`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from rollout_server.schemas.fields import Request


class AbortRequest(Request):
    ids: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=128)]],
        Field(max_length=65_536, description="`id` or X-Request-Id of requests; those that are not open are ignored."),
    ]


class AbortReply(BaseModel):
    aborted: list[str] = Field(description="Ids that were open: their rows end as `aborted` with what they have.")
    unknown: list[str] = Field(description="Ids of nothing that is open.")


class ResetReply(BaseModel):
    freed_bytes: int = Field(description="KV memory that was kept for later requests, bytes.")


class PauseRequest(Request):
    mode: Literal["wait", "keep", "abort"] = Field(
        default="wait",
        description="New work waits; what runs goes on (`wait`), freezes too (`keep`), or ends: requests of which a "
        "row has begun are answered with what they have, `aborted` (`abort`).",
    )


class PauseReply(BaseModel):
    """`waiting` counts requests, `running` rows."""

    paused: bool
    mode: Literal["wait", "keep", "abort"] | None
    waiting: int
    running: int
    instance: str


class StatusReply(BaseModel):
    status: Literal["paused", "resumed"]


class IsPausedReply(BaseModel):
    is_paused: bool


class ReleaseReply(BaseModel):
    released_bytes: int = Field(description="What the server's process holds less than before, bytes.")
    kv_bytes: int = Field(description="How much of it was KV memory.")
