"""Messages through the model's chat template, exactly as transformers' `apply_chat_template` gives them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from rollout_server.errors import InvalidField
from rollout_server.quoting import shortened
from rollout_server.schemas.messages import Message
from rollout_server.schemas.openai.chat import ChatRequest
from rollout_server.schemas.pooling.inputs import Conversation
from rollout_server.schemas.rollouts import Prompt
from rollout_server.schemas.vllm.tokenizer import TokenizeRequest
from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.content_forms import TEMPLATE_FAULTS, ContentForm, content_form, holds_pictures
from rollout_server.text.long_texts import PIECE, Bound
from rollout_server.text.tool_calls import read_arguments

Chat = Prompt | ChatRequest | TokenizeRequest | Conversation

TESTS_ARGUMENTS = re.compile(r"arguments\s+is\s+(?:not\s+)?(?:string|mapping)")
REASON_SHOWN = 300
"""The most characters that are shown of what a chat template says when it refuses: some repeat the messages."""
LAST = "qzlastqz"
"""Marks where the last message ends in a rendered conversation."""


def render(
    chat: Chat, tokenizer: Any, *, param: str, bound: Bound, expand: Callable[[str], str] | None = None
) -> list[int]:
    """`messages` through the tokenizer's chat template; `param` is the place of what holds them, empty for the body.
    `expand` gives each picture in the rendered text as many placeholders as the model reads; without it pictures are
    refused."""
    inside = f"{param}." if param else ""
    messages = f"{inside}messages"
    rows = _rows(chat, tokenizer, inside, messages)
    if expand is None and any(message.image_urls for message in chat.messages or ()):
        raise InvalidField(f"{messages} hold pictures, which this route does not read.", param=messages)
    try:
        if expand is None:
            if _size([rows, chat.tools, chat.chat_template_kwargs]) > PIECE:
                text = str(_apply(chat, tokenizer, rows, chat.tools, tokenize=False))
                bound.check(tokenizer, text, param or messages)
            ids = _apply(chat, tokenizer, rows, chat.tools, tokenize=True)
        else:
            text = expand(str(_apply(chat, tokenizer, rows, chat.tools, tokenize=False)))
            bound.check(tokenizer, text, param or messages)
            ids = tokenizer.encode(text, add_special_tokens=False)
    except TEMPLATE_FAULTS as error:
        # The template is the model's own code: what it raises is about these messages.
        reason = shortened(str(error), REASON_SHOWN).rstrip(".")
        raise InvalidField(f"The chat template refuses {messages}: {reason}.", param=messages) from error
    if not ids:
        raise InvalidField(f"The chat template made nothing of {messages}.", param=messages)
    bound.check_ids(ids, param or messages)
    return list(ids)


def rendered(chat: Chat, tokenizer: Any, *, param: str, expand: Callable[[str], str] | None = None) -> str:
    """The text that `render` made tokens of, for messages that it has accepted."""
    inside = f"{param}." if param else ""
    rows = _rows(chat, tokenizer, inside, f"{inside}messages")
    text = str(_apply(chat, tokenizer, rows, chat.tools, tokenize=False))
    return text if expand is None else expand(text)


def opens_thinking(chat: ChatRequest, tokenizer: Any, format: ReplyFormat) -> bool:
    """Returns whether the prompt ends inside of reasoning: by what the template writes behind the last message, where
    no mark is of the messages' own making. A message of the assistant that is to be continued is the reply's own
    beginning."""
    if format.think_start is None or format.think_end is None:
        return False
    rows = _rows(chat, tokenizer, "", "messages")
    begun = rows.pop() if chat.continue_final_message and rows[-1]["role"] == "assistant" else None
    first = {format.think_start[0], format.think_end[0]}
    rows = [_unmarked(row, first) for row in rows]
    if rows:
        rows[-1]["content"] = _with_end(rows[-1].get("content"))
    try:
        tools = _unmarked(chat.tools, first)
        text = str(_apply(chat, tokenizer, rows if begun is None else [*rows, begun], tools, tokenize=False))
    except TEMPLATE_FAULTS:
        return False
    behind = text.rpartition(LAST)[2]
    return behind.rfind(format.think_start) > behind.rfind(format.think_end)


def template_source(tokenizer: Any, tools: list[dict[str, Any]] | None) -> str:
    """The chat template that transformers takes: some models have one of their own for tools."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return str((template.get("tool_use") if tools else None) or template.get("default") or "")
    return str(template)


def _rows(chat: Chat, tokenizer: Any, inside: str, messages: str) -> list[dict[str, Any]]:
    """The messages as the template reads them. Raises `InvalidField` for what goes with no template."""
    if not tokenizer.chat_template:
        raise InvalidField("This model has no chat template; send text or token_ids.", param=messages)
    both = chat.add_generation_prompt and chat.continue_final_message
    if both and "add_generation_prompt" in chat.model_fields_set:
        raise InvalidField(
            "continue_final_message excludes add_generation_prompt.", param=f"{inside}continue_final_message"
        )
    _check_template_arguments(chat.chat_template_kwargs or {}, tokenizer, param=f"{inside}chat_template_kwargs")
    source = template_source(tokenizer, chat.tools)
    return [
        _as_template_reads(message, tokenizer, source, f"{messages}[{at}]")
        for at, message in enumerate(chat.messages or ())
    ]


def _apply(chat: Chat, tokenizer: Any, rows: Any, tools: Any, *, tokenize: bool) -> Any:
    return tokenizer.apply_chat_template(
        rows,
        tools=tools,
        add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
        continue_final_message=chat.continue_final_message,
        tokenize=tokenize,
        return_dict=False,
        **(chat.chat_template_kwargs or {}),
    )


def _as_template_reads(message: Message, tokenizer: Any, source: str, param: str) -> dict[str, Any]:
    """A message with its content in the form that the template takes, and arguments of tool calls as objects. These
    stay text where the template asks for their type, and so writes them exactly as the model did."""
    row = message.model_dump(exclude_unset=True)
    if "content" in row:
        form = content_form(tokenizer, source, message.role)
        if isinstance(row["content"], list):
            row["content"] = [{"type": "image"} if part["type"] == "image_url" else part for part in row["content"]]
        if holds_pictures(row["content"]) and form not in (ContentForm.PARTS, ContentForm.EITHER):
            raise InvalidField(
                f"{param} holds a picture, and the chat template of this model has no place for one in a message of "
                f"the role {message.role}.",
                param=f"{param}.content",
            )
        row["content"] = form.of(row["content"])
    if message.tool_calls is not None and not TESTS_ARGUMENTS.search(source):
        row["tool_calls"] = [
            _with_arguments(call, f"{param}.tool_calls[{at}]") for at, call in enumerate(message.tool_calls)
        ]
    return row


def _with_arguments(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = read_arguments(function["arguments"], f"{param}.function.arguments")
    return call | {"function": function | {"arguments": arguments}}


def _check_template_arguments(extra: dict[str, Any], tokenizer: Any, *, param: str) -> None:
    """`chat_template_kwargs` holds variables of the template, not arguments of the call that renders it."""
    taken = {"self", "messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    if wrong := sorted(taken & extra.keys()):
        raise InvalidField(f"{param} cannot set {wrong[0]!r}, which is no variable of a chat template.", param=param)


def _size(value: Any) -> int:
    """How many characters all text in a value has."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _unmarked(value: Any, first: set[str]) -> Any:
    """The same value without the characters that marks begin with."""
    if isinstance(value, str):
        return value.translate({ord(character): "." for character in first})
    if isinstance(value, dict):
        return {_unmarked(name, first): _unmarked(inner, first) for name, inner in value.items()}
    return [_unmarked(inner, first) for inner in value] if isinstance(value, list) else value


def _with_end(content: Any) -> Any:
    """A message's content with `LAST` behind it."""
    if isinstance(content, list):
        alone = len(content) == 1 and "text" in content[0]
        return [_longer(content[0])] if alone else [*content, {"type": "text", "text": LAST}]
    return f"{content or ''}{LAST}"


def _longer(part: dict[str, Any]) -> dict[str, Any]:
    return part | {"text": part["text"] + LAST}
