"""`POST /v1/embeddings`, after the OpenAI API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from rollout_server.schemas.fields import Count, LastTokens, PolicyText, Request
from rollout_server.schemas.openai.completions import PromptForm


class EmbeddingsRequest(Request):
    model: PolicyText = Field(description="The base's id, `base`, NAME, NAME@7 or NAME@sha256:…")
    input: PromptForm
    encoding_format: Literal["float", "base64"] = Field(
        default="float", description="base64: of little-endian float32."
    )
    dimensions: Count | None = Field(
        default=None, description="Keeps so many of the first numbers, brought to length 1 again."
    )
    truncate_prompt_tokens: LastTokens | None = Field(
        default=None,
        description="Keeps so many of the last tokens, -1 what the context holds. Without it too long is a 400.",
    )
    user: str | None = Field(default=None, description="The caller's own mark; changes nothing.")


# ---- replies ------------------------------------------------------------------------------------------------------


class EmbeddingReply(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    """Embeddings in the order of the request; `X-Policy` and `X-Policy-Digest` say under which version."""

    object: Literal["list"]
    data: list[EmbeddingReply]
    model: str
    usage: EmbeddingUsage
