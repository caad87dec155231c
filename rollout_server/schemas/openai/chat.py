"""`POST /v1/chat/completions`, after the OpenAI API with vLLM's names for extensions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.quoting import quoted
from rollout_server.schemas.fields import Count, Request, Whole, unsupported
from rollout_server.schemas.messages import Conversation
from rollout_server.schemas.openai.options import ChoiceRollout, OpenAIRequest
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


class ToolName(Request):
    name: Annotated[str, Field(min_length=1)]


class NamedTool(Request):
    type: Literal["function"]
    function: ToolName


WORD, NAMED = "<word>", "<named>"


def _choice_form(value: Any) -> str:
    return NAMED if isinstance(value, dict | NamedTool) else WORD


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(WORD)] | Annotated[NamedTool, Tag(NAMED)],
    Discriminator(_choice_form),
]


class ChatRequest(OpenAIRequest, Conversation):
    later: ClassVar = {**OpenAIRequest.later, **LATER_CHAT}

    max_completion_tokens: Count | None = Field(default=None, description="What fits, if absent.")
    max_tokens: Count | None = Field(default=None, description="The older name of max_completion_tokens.")
    logprobs: bool = False
    top_logprobs: Whole | None = Field(default=None, description="Alternatives for every token; needs `logprobs`.")
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`auto`, the default with tools: calls are parsed out of the reply. `required`, or the name of a "
        "tool: a grammar sees to calls, where the model writes them as JSON. `none`: they stay text. In any case the "
        "chat template gets the tools.",
    )

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
        if self.tool_choice not in (None, "none") and not self.tools:
            raise PydanticCustomError("tool_choice", "needs tools", {"field": "tool_choice"})
        if self.called_name is not None and not self.callable_tools:
            raise PydanticCustomError(
                "tool_choice",
                "names {name}, which is none of the tools",
                {"field": "tool_choice", "name": quoted(self.called_name)},
            )
        if self.must_call and self.constrained:
            raise PydanticCustomError(
                "tool_choice", "asks for a call, and another field for another text", {"field": "tool_choice"}
            )
        return self

    @property
    def must_call(self) -> bool:
        """True if the reply has to be calls of tools."""
        return self.tool_choice == "required" or self.called_name is not None

    @property
    def called_name(self) -> str | None:
        """The tool that has to be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The functions that may be called."""
        functions = [tool["function"] for tool in self.tools or ()]
        return [each for each in functions if self.called_name in (None, each["name"])]

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
    """An event of a stream; `usage` is null in all but the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None
    prompt_token_ids: list[int] | None = None
