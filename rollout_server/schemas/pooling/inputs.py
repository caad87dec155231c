"""What goes into routes that score: texts, ids or messages, and how the scores come out."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import LastTokens, PolicyText, Request, TokenIds, exactly_one
from rollout_server.schemas.messages import Messages
from rollout_server.schemas.openai.completions import PromptForm

CONVERSATION = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class ScoringRequest(Request):
    """What vLLM's pooling routes share."""

    later: ClassVar = {
        "priority": (0,),
        "mm_processor_kwargs": ({},),
        "media_io_kwargs": ({},),
        "chat_template": (),
        "cache_salt": (),
        "truncation_side": ("left",),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }

    model: PolicyText | None = Field(
        default=None,
        description="The base's id, `base`, NAME, NAME@7 or NAME@sha256:…; the one that scores, if absent.",
    )
    truncate_prompt_tokens: LastTokens | None = Field(
        default=None,
        description="Keeps so many of the last tokens, -1 what the context holds. Without it too long is a 400.",
    )
    use_activation: bool | None = Field(
        default=None,
        description="Whether scores become probabilities: by a sigmoid for one label, a softmax for more, or what the "
        "model's files say. True if absent.",
    )
    activation: bool | None = Field(default=None, description="Another name of `use_activation`.")
    user: str | None = Field(default=None, description="The caller's own mark; changes nothing.")
    request_id: str | None = Field(default=None, description="Likewise.")

    @model_validator(mode="after")
    def _one_activation(self) -> ScoringRequest:
        if None not in (self.use_activation, self.activation) and self.use_activation != self.activation:
            raise PydanticCustomError("twofold", "contradicts use_activation", {"field": "activation"})
        return self

    @property
    def activates(self) -> bool:
        return self.use_activation is not False and self.activation is not False


class Conversation(Request):
    """The fields that go with `messages`; no generation prompt is written, since what was said is judged."""

    messages: Messages | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


def check_conversation(data: Conversation, others: tuple[str, ...]) -> None:
    """One of `others` or `messages`, and only what goes with it."""
    given = [name for name in (*others, "messages") if getattr(data, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise PydanticCustomError(
            "prompt_kind",
            "must have one of {names}; this one has {found}",
            {"names": f"{', '.join(others)} and messages", "found": found},
        )
    if given[0] == "messages":
        if "add_special_tokens" in data.model_fields_set:
            raise PydanticCustomError(
                "prompt_option",
                "goes with text: a chat template writes its special tokens itself",
                {"field": "add_special_tokens"},
            )
        return
    for name in CONVERSATION:
        if name in data.model_fields_set:
            raise PydanticCustomError("prompt_option", "goes with messages", {"field": name})


class PoolingInput(ScoringRequest, Conversation):
    """`input` or `messages`."""

    model_config = ConfigDict(json_schema_extra=exactly_one("input", "messages"))

    input: PromptForm | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_kind(self) -> PoolingInput:
        check_conversation(self, ("input",))
        return self


class Steps(Request):
    """Where a process reward is read: at every token with an id, at the last token of every occurrence of a text, or at
    given positions, a list for each sequence."""

    model_config = ConfigDict(json_schema_extra=exactly_one("token_id", "text", "positions"))

    token_id: Annotated[int, Field(ge=0)] | None = None
    text: Annotated[str, Field(min_length=1)] | None = None
    positions: list[TokenIds] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Steps:
        given = [name for name in ("token_id", "text", "positions") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise PydanticCustomError(
                "steps_kind", "must have one of token_id, text and positions; this one has {found}", {"found": found}
            )
        return self


# ---- replies ------------------------------------------------------------------------------------------------------


class ScoringUsage(BaseModel):
    """Nothing is sampled."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0]
