"""Prompts of any form → token ids, exactly as transformers' `encode` and `apply_chat_template` give them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.quoting import counted, quoted, shortened
from rollout_server.schemas.completions import CompletionsRequest
from rollout_server.schemas.rollouts import Prompt

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


def render(prompt: Prompt, tokenizer: Any, *, param: str) -> list[int]:
    """`messages` through the tokenizer's chat template."""
    messages = f"{param}.messages"
    if not tokenizer.chat_template:
        raise InvalidField("This model has no chat template; send text or token_ids.", param=messages)
    both = prompt.add_generation_prompt and prompt.continue_final_message
    if both and "add_generation_prompt" in prompt.model_fields_set:
        raise InvalidField(
            "continue_final_message excludes add_generation_prompt.", param=f"{param}.continue_final_message"
        )
    extra = prompt.chat_template_kwargs or {}
    check_template_arguments(extra, tokenizer, param=f"{param}.chat_template_kwargs")
    try:
        ids = tokenizer.apply_chat_template(
            [message.model_dump(exclude_unset=True) for message in prompt.messages or ()],
            tools=prompt.tools,
            add_generation_prompt=prompt.add_generation_prompt and not prompt.continue_final_message,
            continue_final_message=prompt.continue_final_message,
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


def check_template_arguments(extra: dict[str, Any], tokenizer: Any, *, param: str) -> None:
    """`chat_template_kwargs` holds variables of the template, not arguments of the call that renders it."""
    taken = {"self", "messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    if wrong := sorted(taken & extra.keys()):
        raise InvalidField(f"{param} cannot set {wrong[0]!r}, which is no variable of a chat template.", param=param)


def completion_prompts(data: CompletionsRequest, tokenizer: Any) -> list[tuple[PromptTokens, str]]:
    """The prompts of `/v1/completions` with their places, in any of the four forms."""
    prompt = data.prompt
    if isinstance(prompt, str):
        return [_text(prompt, tokenizer, "prompt")]
    if not prompt or isinstance(prompt[0], int):
        return [(PromptTokens(some([id for id in prompt if isinstance(id, int)], "prompt")), "prompt")]
    found = []
    for index, item in enumerate(prompt):
        place = f"prompt[{index}]"
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
