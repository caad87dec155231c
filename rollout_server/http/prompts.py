"""Prompts of any form → token ids, exactly as transformers' `encode` and `apply_chat_template` give them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.body import parse_json
from rollout_server.quoting import counted, quoted, shortened
from rollout_server.schemas.chat import ChatRequest
from rollout_server.schemas.messages import Message
from rollout_server.schemas.rollouts import Prompt
from rollout_server.schemas.tokens import TokenizeRequest

TESTS_ARGUMENTS = re.compile(r"arguments\s+is\s+(?:not\s+)?(?:string|mapping)")
REASON_SHOWN = 300
"""Characters of what a chat template says when it refuses: some repeat the messages."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model reads it, and as text if it came as text."""

    ids: list[int]
    text: str | None = None


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
    """`tokenizer.encode`; at least one token."""
    return some(tokenizer.encode(text, add_special_tokens=add_special_tokens), param)


def some(ids: list[int], param: str) -> list[int]:
    """The ids, if there are any."""
    if not ids:
        raise InvalidField(f"{param} is empty: give at least one token.", param=param)
    return ids


def tokens_of(prompt: Prompt, tokenizer: Any, *, param: str) -> PromptTokens:
    """One prompt of `/v1/rollouts`; `param` is its place in the request."""
    if prompt.token_ids is not None:
        return PromptTokens(some(prompt.token_ids, f"{param}.token_ids"))
    if prompt.text is not None:
        ids = encode(tokenizer, prompt.text, add_special_tokens=prompt.add_special_tokens, param=f"{param}.text")
        return PromptTokens(ids, prompt.text)
    return PromptTokens(render(prompt, tokenizer, param=param))


def render(chat: Prompt | ChatRequest | TokenizeRequest, tokenizer: Any, *, param: str) -> list[int]:
    """`messages` through the tokenizer's chat template; `param` is the place of what holds them, empty for the body."""
    inside = f"{param}." if param else ""
    messages = f"{inside}messages"
    if not tokenizer.chat_template:
        raise InvalidField("This model has no chat template; send text or token_ids.", param=messages)
    both = chat.add_generation_prompt and chat.continue_final_message
    if both and "add_generation_prompt" in chat.model_fields_set:
        raise InvalidField(
            "continue_final_message excludes add_generation_prompt.", param=f"{inside}continue_final_message"
        )
    extra = chat.chat_template_kwargs or {}
    check_template_arguments(extra, tokenizer, param=f"{inside}chat_template_kwargs")
    source = template_source(tokenizer, chat.tools)
    rows = [as_template_reads(message, source, f"{messages}[{at}]") for at, message in enumerate(chat.messages or ())]
    try:
        ids = tokenizer.apply_chat_template(
            rows,
            tools=chat.tools,
            add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            tokenize=True,
            return_dict=False,
            **extra,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        # The template is the model's own code: what it raises is about these messages.
        reason = shortened(str(error), REASON_SHOWN).rstrip(".")
        raise InvalidField(f"The chat template refuses {messages}: {reason}.", param=messages) from error
    if not ids:
        raise InvalidField(f"The chat template made nothing of {messages}.", param=messages)
    return list(ids)


def template_source(tokenizer: Any, tools: list[dict[str, Any]] | None) -> str:
    """The chat template that transformers takes: some models have one of their own for tools."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return str((template.get("tool_use") if tools else None) or template.get("default") or "")
    return str(template)


def as_template_reads(message: Message, source: str, param: str) -> dict[str, Any]:
    """A message as transformers documents it: content as one text, arguments of tool calls as objects. Arguments stay
    text where the template asks for their type, and so writes them exactly as the model did."""
    row = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        row["content"] = "".join(part.text for part in message.content)
    if message.tool_calls is not None and not TESTS_ARGUMENTS.search(source):
        row["tool_calls"] = [
            _with_arguments(call, f"{param}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)
        ]
    return row


def _with_arguments(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    place = f"{param}.function.arguments"
    arguments = parse_json(function["arguments"].encode() or b"{}", param=place)
    if not isinstance(arguments, dict):
        raise InvalidField(f"{place} must be an object, as JSON text.", param=place)
    return call | {"function": function | {"arguments": arguments}}


def check_template_arguments(extra: dict[str, Any], tokenizer: Any, *, param: str) -> None:
    """`chat_template_kwargs` holds variables of the template, not arguments of the call that renders it."""
    taken = {"self", "messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    if wrong := sorted(taken & extra.keys()):
        raise InvalidField(f"{param} cannot set {wrong[0]!r}, which is no variable of a chat template.", param=param)


def prompts_of(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[list[int]], tokenizer: Any, *, param: str
) -> list[tuple[PromptTokens, str]]:
    """The prompts of an OpenAI route with their places, in any of the four forms; `param` is the field they are in."""
    if isinstance(prompt, str):
        return [_text(prompt, tokenizer, param)]
    if not prompt or isinstance(prompt[0], int):
        return [(PromptTokens(some([id for id in prompt if isinstance(id, int)], param)), param)]
    found = []
    for index, item in enumerate(prompt):
        place = f"{param}[{index}]"
        if isinstance(item, str):
            found.append(_text(item, tokenizer, place))
        elif isinstance(item, list):
            found.append((PromptTokens(some(item, place)), place))
    return found


def _text(text: str, tokenizer: Any, place: str) -> tuple[PromptTokens, str]:
    return PromptTokens(encode(tokenizer, text, add_special_tokens=True, param=place), text), place


def room(prompt_tokens: int, asked: int | None, context: int, *, prompt_param: str, param: str) -> int:
    """max_tokens of a row: what was asked for if it fits, all that fits if nothing was asked for."""
    left = context - prompt_tokens
    if left < 1:
        raise ContextExceeded(
            f"{prompt_param} has {counted(prompt_tokens, 'token')}; the context holds {context}, the reply included.",
            param=prompt_param,
        )
    if asked is None:
        return left
    if asked > left:
        raise ContextExceeded(
            f"{prompt_param} has {counted(prompt_tokens, 'token')} and {param} is {quoted(asked)}; the context holds "
            f"{context}.",
            param=param,
        )
    return asked
