"""`POST /v1/abort` and `POST /v1/release`."""

from __future__ import annotations

from typing import Annotated

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


class ReleaseReply(BaseModel):
    released_bytes: int = Field(description="What the server's process holds less than before, bytes.")
    kv_bytes: int = Field(description="How much of it was KV memory.")
