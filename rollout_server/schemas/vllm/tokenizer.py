"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from rollout_server.schemas.fields import PolicyText, Request, TokenIds, exactly_one
from rollout_server.schemas.messages import Messages


class TokenizeRequest(Request):
    """Either `prompt` or `messages`."""

    model_config = ConfigDict(json_schema_extra=exactly_one("prompt", "messages"))

    later: ClassVar = {"chat_template": (), "mm_processor_kwargs": ({},), "media_io_kwargs": ({},)}

    model: PolicyText | None = Field(default=None, description="All policies of a server have one tokenizer.")
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(default=None, description="True for a prompt, false for messages.")
    return_token_strs: bool = False
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt_kind", "must have one of prompt and messages")
        if self.messages is not None:
            if self.add_special_tokens:
                raise PydanticCustomError(
                    "prompt_option",
                    "goes with prompt: a chat template writes its special tokens itself",
                    {"field": "add_special_tokens"},
                )
            return self
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if name in self.model_fields_set:
                raise PydanticCustomError("prompt_option", "goes with messages", {"field": name})
        return self


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Request):
    model: PolicyText | None = None
    tokens: TokenIds


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerInfoReply(BaseModel):
    """What a client needs to render and to count as this server does."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]
    chat_template: str | dict[str, str] | None
    model_max_length: int
    vocab_size: int
