"""Prompts of any form → token ids, exactly as transformers' `encode` and `apply_chat_template` give them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.schemas.completions import CompletionsRequest
from rollout_server.schemas.rollouts import Prompt

LONG_TEXT = 100_000
"""Characters above which tokenising leaves the event loop."""
TEMPLATE_ARGUMENTS = frozenset(
    {
        *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "chat_template", "conversation"),
        *("tools", "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"),
        *("tokenizer_kwargs", "documents", "messages"),
    }
)
"""What `chat_template_kwargs` may not set: arguments of the call itself."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model reads it, and as text if it came as text."""

    ids: list[int]
    text: str | None = None


async def encode(tokenizer: Any, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
    """`tokenizer.encode`. Long texts are encoded on another thread, so that the server goes on answering."""
    if len(text) > LONG_TEXT:
        ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    else:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise InvalidField(f"{param} is empty: give at least one token.", param=param)
    return list(ids)


async def tokens_of(prompt: Prompt, tokenizer: Any, *, param: str) -> PromptTokens:
    """One prompt of `/v1/rollouts`; `param` is its place in the request."""
    if prompt.token_ids is not None:
        if not prompt.token_ids:
            raise InvalidField(f"{param}.token_ids is empty: give at least one token.", param=f"{param}.token_ids")
        return PromptTokens(prompt.token_ids)
    if prompt.text is not None:
        ids = await encode(tokenizer, prompt.text, add_special_tokens=prompt.add_special_tokens, param=f"{param}.text")
        return PromptTokens(ids, prompt.text)
    return PromptTokens(render(prompt, tokenizer, param=f"{param}.messages"))


def render(prompt: Prompt, tokenizer: Any, *, param: str) -> list[int]:
    """`messages` through the tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise InvalidField("This model has no chat template; send text or token_ids.", param=param)
    both = prompt.add_generation_prompt and prompt.continue_final_message
    if both and "add_generation_prompt" in prompt.model_fields_set:
        raise InvalidField("continue_final_message excludes add_generation_prompt.", param=param)
    extra = prompt.chat_template_kwargs or {}
    if wrong := sorted(TEMPLATE_ARGUMENTS & extra.keys()):
        raise InvalidField(f"chat_template_kwargs may not set {wrong[0]!r}.", param=param)
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
        raise InvalidField(f"The chat template refuses these messages: {error}", param=param) from error
    if not ids:
        raise InvalidField("The chat template made nothing of these messages.", param=param)
    return list(ids)


async def completion_prompts(data: CompletionsRequest, tokenizer: Any) -> list[tuple[PromptTokens, str]]:
    """The prompts of `/v1/completions` with their places, in any of the four forms."""
    prompt = data.prompt
    if isinstance(prompt, str):
        return [await _text(prompt, tokenizer, "prompt")]
    if not prompt:
        raise InvalidField("The prompt is empty: give at least one token.", param="prompt")
    if isinstance(prompt[0], int):
        return [(PromptTokens([id for id in prompt if isinstance(id, int)]), "prompt")]
    found = []
    for index, item in enumerate(prompt):
        place = f"prompt[{index}]"
        if isinstance(item, str):
            found.append(await _text(item, tokenizer, place))
        elif isinstance(item, list):
            if not item:
                raise InvalidField(f"{place} is empty: give at least one token.", param=place)
            found.append((PromptTokens(item), place))
    return found


async def _text(text: str, tokenizer: Any, place: str) -> tuple[PromptTokens, str]:
    return PromptTokens(await encode(tokenizer, text, add_special_tokens=True, param=place), text), place


def room(prompt_tokens: int, asked: int | None, context: int, *, prompt_param: str, param: str) -> int:
    """max_tokens of a row: what was asked for if it fits, all that fits if nothing was asked for."""
    left = context - prompt_tokens
    if left < 1:
        raise ContextExceeded(
            f"{prompt_param} has {prompt_tokens} tokens; the context holds {context}, the reply included.",
            param=prompt_param,
        )
    if asked is None:
        return left
    if asked > left:
        raise ContextExceeded(
            f"{prompt_param} has {prompt_tokens} tokens and {param} is {asked}; the context holds {context}.",
            param=param,
        )
    return asked
