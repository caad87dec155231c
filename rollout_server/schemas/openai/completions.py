"""`POST /v1/completions`, after the OpenAI API with vLLM's names for extensions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import TokenIds, Whole
from rollout_server.schemas.openai.options import ChoiceRollout, OpenAIRequest
from rollout_server.schemas.rollouts import Usage

TEXT, TEXTS, IDS, ID_LISTS = "<text>", "<texts>", "<ids>", "<id lists>"


def _prompt_form(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], str):
        return TEXTS
    return ID_LISTS if value and isinstance(value[0], list) else IDS


PromptForm = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[str], Tag(TEXTS)]
    | Annotated[TokenIds, Tag(IDS)]
    | Annotated[list[TokenIds], Tag(ID_LISTS)],
    Discriminator(
        _prompt_form,
        custom_error_type="prompt_form",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]
"""A string, strings, token ids, or lists of token ids."""


class CompletionsRequest(OpenAIRequest):
    later: ClassVar = {**OpenAIRequest.later, "best_of": (1,), "suffix": ()}

    prompt: PromptForm
    max_tokens: Whole = Field(default=16, description="If absent, less where less fits; 0 with echo.")
    logprobs: Whole | None = Field(default=None, description="How many alternatives; 0 for the sampled tokens alone.")
    echo: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionsRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError(
                "max_tokens",
                'is 0, which needs "echo": true: there would be nothing to return',
                {"field": "max_tokens"},
            )
        if self.max_tokens == 0 and self.min_tokens > 0:
            raise PydanticCustomError(
                "min_tokens", "is above 0, but with max_tokens 0 nothing is sampled", {"field": "min_tokens"}
            )
        return self


# ---- replies ------------------------------------------------------------------------------------------------------


class ChoiceLogprobs(BaseModel):
    """Four arrays of one length. `text_offset` counts characters of `text`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "superseded", "aborted", "error"] | None
    stop_reason: str | int | None
    rollout: ChoiceRollout | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionsReply(BaseModel):
    """The whole reply, and every chunk of a stream (there `usage` is null but in the last)."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None
