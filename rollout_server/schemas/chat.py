"""`POST /v1/chat/completions`, after the OpenAI API with vLLM's names for extensions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import Count, Whole, unsupported
from rollout_server.schemas.messages import Conversation
from rollout_server.schemas.openai import ChoiceRollout, OpenAIRequest
from rollout_server.schemas.rollouts import Usage

LATER_CHAT: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "store": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "best_of": (1,),
}


class ChatRequest(OpenAIRequest, Conversation):
    later: ClassVar = {**OpenAIRequest.later, **LATER_CHAT}

    max_completion_tokens: Count | None = Field(default=None, description="What fits, if absent.")
    max_tokens: Count | None = Field(default=None, description="The older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: Whole | None = Field(default=None, description="Alternatives for every token; needs `logprobs`.")
    tool_choice: Literal["none", "auto"] | None = Field(
        default=None,
        description="`auto`, the default with tools: calls are parsed out of the reply. `none`: they stay text. Either "
        "way the chat template gets the tools.",
    )

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _free_choice(cls, value: Any) -> Any:
        if value == "required" or isinstance(value, dict):
            what = "'required'" if value == "required" else "the name of a tool"
            raise unsupported("", f"cannot be {what} with this server yet; use 'auto' or 'none'")
        return value

    @field_validator("tools")
    @classmethod
    def _functions(cls, value: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for index, tool in enumerate(value or ()):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or not _named(function):
                raise PydanticCustomError(
                    "tool_form",
                    'must be {"type": "function", "function": {"name": …}}',
                    {"field": index},
                )
            if function.get("strict"):
                raise unsupported(index, "is strict, which is not supported by this server yet")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError(
                "max_tokens", "differs from max_completion_tokens; give one of them", {"field": "max_tokens"}
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", 'needs "logprobs": true', {"field": "top_logprobs"})
        if self.tool_choice == "auto" and not self.tools:
            raise PydanticCustomError("tool_choice", "needs tools", {"field": "tool_choice"})
        return self

    @property
    def limit_name(self) -> str:
        """The name under which the limit of tokens was given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _named(function: dict[str, Any]) -> bool:
    return isinstance(function.get("name"), str) and bool(function["name"])


# ---- replies ------------------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """`bytes` are those of the token's text in UTF-8, or its own where it is only part of a character."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Every sampled token: of reasoning and of tool calls too, the end token included."""

    content: list[TokenLogprob]
    refusal: None


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as text.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatEnding(BaseModel):
    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "superseded", "aborted", "error"] | None
    stop_reason: str | int | None
    rollout: ChoiceRollout | None
    token_ids: list[int] | None = None


class ChatChoice(ChatEnding):
    message: AssistantMessage


class ChatChunkChoice(ChatEnding):
    delta: Delta


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class ChatUsage(Usage):
    completion_tokens_details: CompletionTokensDetails | None = None


class ChatReply(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    prompt_token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """An event of a stream; `usage` is null but in the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None
    prompt_token_ids: list[int] | None = None
