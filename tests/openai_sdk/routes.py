"""The two routes in one shape, so that one matrix serves both: what is asked, and what came back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PROMPT = "12+34="
ROUTES = ("completions", "chat")


@dataclass
class Answer:
    """A choice, whole or put together from a stream."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    tops: list[list[tuple[str, float]]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    versions: list[Any] = field(default_factory=list)
    mode: str | None = None


def resource(client: Any, route: str) -> Any:
    return client.chat.completions if route == "chat" else client.completions


def arguments(route: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """The SDK's arguments. `top` asks for log-probabilities in the route's own way; fields that the SDK does not know
    go into its extra_body."""
    top = fields.pop("top", None)
    known = {"model": "base", "max_tokens": 8, "seed": 3}
    if route == "chat":
        known |= {"messages": [{"role": "user", "content": prompt}]}
        known |= {} if top is None else {"logprobs": True, "top_logprobs": top}
    else:
        known |= {"prompt": prompt} | ({} if top is None else {"logprobs": top})
    return known | fields


def whole(route: str, reply: Any) -> list[Answer]:
    answers = [Answer() for _ in reply.choices]
    for at, choice in enumerate(reply.choices):
        assert choice.index == at
        _add(answers[at], route, choice, choice.message.content if route == "chat" else choice.text)
    return answers


def streamed(route: str, events: Iterable[Any], count: int = 1) -> tuple[list[Answer], Any]:
    """The choices and the usage."""
    answers, usage = [Answer() for _ in range(count)], None
    for event in events:
        usage = event.usage or usage
        for choice in event.choices:
            _add(answers[choice.index], route, choice, choice.delta.content if route == "chat" else choice.text)
    return answers, usage


def _add(answer: Answer, route: str, choice: Any, text: str | None) -> None:
    assert answer.finish_reason is None, "a choice goes on after its end"
    answer.text += text or ""
    answer.ids += getattr(choice, "token_ids", None) or []
    if choice.logprobs is not None and route == "chat":
        for entry in choice.logprobs.content:
            answer.tokens.append(entry.token)
            answer.values.append(entry.logprob)
            answer.tops.append([(top.token, top.logprob) for top in entry.top_logprobs])
    elif choice.logprobs is not None:
        answer.tokens += choice.logprobs.tokens
        answer.values += choice.logprobs.token_logprobs
        answer.tops += [list((top or {}).items()) for top in choice.logprobs.top_logprobs]
        answer.offsets += choice.logprobs.text_offset
    answer.finish_reason = choice.finish_reason
    if choice.rollout is not None:
        answer.versions, answer.mode = choice.rollout["versions"], choice.rollout["logprobs_mode"]
