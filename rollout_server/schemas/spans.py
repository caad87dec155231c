"""Spans as a request carries them: what sampled which tokens of a rollout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rollout_server.schemas.fields import PolicyText, Request, Whole

FullDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class SpanToRead(Request):
    """A span as a rollout carries it. The version is named by number, by digest, or by both, which must then agree."""

    policy: PolicyText | None = None
    version: Whole | None = None
    digest: FullDigest | None = None
    label: str | None = None
    start: Whole
    end: Whole
    kv: Literal["carried", "recomputed"] | None = None


class SpanToKeep(SpanToRead):
    """A span that is handed back as it came; nothing has to be known here by its name."""

    version: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    label: Annotated[str, Field(max_length=64)] | None = None
