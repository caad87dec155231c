"""What the OpenAI routes share: how to sample, how to answer, and what a choice says of its versions."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import (
    Count,
    LogitBias,
    OneOrMany,
    PolicyText,
    Request,
    SamplingNumbers,
    Seed,
    TokenIds,
)
from rollout_server.schemas.rollouts import ErrorInRow, SpanReply
from rollout_server.schemas.structured import Structured

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class StreamOptions(Request):
    include_usage: bool = False


class OpenAIRequest(SamplingNumbers, Structured):
    later: ClassVar = {"user": ()}

    model: PolicyText = Field(
        description="The base's id, `base`, NAME, NAME@7 or NAME@sha256:…; of another model MODEL or MODEL/NAME."
    )
    n: Count = 1
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: Seed | None = None
    stop: OneOrMany = Field(default_factory=list, description="Up to 64 strings.")
    stop_token_ids: TokenIds = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    logprobs_mode: LogprobsMode = Field(
        default="raw_logprobs",
        description="Of the model's unmodified distribution, or of the one sampled from.",
    )

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> OpenAIRequest:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", 'needs "stream": true', {"field": "stream_options"})
        return self


class ChoiceRollout(BaseModel):
    """Which versions sampled which tokens of the choice."""

    versions: list[SpanReply]
    logprobs_mode: LogprobsMode
    error: ErrorInRow | None = None
