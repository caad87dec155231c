"""Prompts of any form → token ids, exactly as transformers' `encode` and `apply_chat_template` give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_server.errors import ContextExceeded, InvalidField
from rollout_server.http.requests.tokens.rendering import render
from rollout_server.quoting import counted, quoted
from rollout_server.schemas.rollouts import Prompt
from rollout_server.text.long_texts import Bound


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model reads it, and as text if it came as text."""

    ids: list[int]
    text: str | None = None


def encode(
    tokenizer: Any, text: str, *, add_special_tokens: bool, param: str, bound: Bound, place: str | None = None
) -> list[int]:
    """`tokenizer.encode`; at least one token. What is too long is too long for `place`, or else for `param`."""
    bound.check(tokenizer, text, place or param)
    ids = some(tokenizer.encode(text, add_special_tokens=add_special_tokens), param)
    bound.check_ids(ids, place or param)
    return ids


def some(ids: list[int], param: str) -> list[int]:
    """The ids, if there are any."""
    if not ids:
        raise InvalidField(f"{param} is empty: give at least one token.", param=param)
    return ids


def tokens_of(
    prompt: Prompt, tokenizer: Any, *, param: str, bound: Bound, expand: Callable[[str], str] | None = None
) -> PromptTokens:
    """One prompt of `/v1/rollouts`; `param` is its place in the request, `expand` as `render` takes it."""
    if prompt.token_ids is not None:
        return PromptTokens(some(prompt.token_ids, f"{param}.token_ids"))
    if prompt.text is not None:
        special, inside = prompt.add_special_tokens, f"{param}.text"
        ids = encode(tokenizer, prompt.text, add_special_tokens=special, param=inside, bound=bound, place=param)
        return PromptTokens(ids, prompt.text)
    return PromptTokens(render(prompt, tokenizer, param=param, bound=bound, expand=expand))


def how_many(prompt: str | Sequence[Any]) -> int:
    """How many prompts there are in any of the four forms, told before any is tokenized."""
    several = not isinstance(prompt, str) and bool(prompt) and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


def prompts_of(
    prompt: str | Sequence[str] | Sequence[int] | Sequence[list[int]],
    tokenizer: Any,
    *,
    param: str,
    bound: Bound,
    add_special_tokens: bool = True,
) -> list[tuple[PromptTokens, str]]:
    """The prompts of an OpenAI route with their places, in any of the four forms; `param` is the field they are in."""
    if isinstance(prompt, str):
        return [_text(prompt, tokenizer, param, bound, add_special_tokens)]
    if not prompt or isinstance(prompt[0], int):
        return [(PromptTokens(some([id for id in prompt if isinstance(id, int)], param)), param)]
    found = []
    for index, item in enumerate(prompt):
        place = f"{param}[{index}]"
        if isinstance(item, str):
            found.append(_text(item, tokenizer, place, bound, add_special_tokens))
        elif isinstance(item, list):
            found.append((PromptTokens(some(item, place)), place))
    return found


def _text(text: str, tokenizer: Any, place: str, bound: Bound, add_special_tokens: bool) -> tuple[PromptTokens, str]:
    ids = encode(tokenizer, text, add_special_tokens=add_special_tokens, param=place, bound=bound)
    return PromptTokens(ids, text), place


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
