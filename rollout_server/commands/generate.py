"""`rollout-server generate`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout_server.commands.asking.server_choice import Adapters, Model, Revision, client_of
from rollout_server.commands.terminal.command_options import Json, Url, one_sentence, option, print_json
from rollout_server.commands.terminal.completing import policies

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_TOKENS = 256


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Without it, or as `-`, standard input is the prompt.")] = None,
    policy: Annotated[str, option("Address of the policy, as NAME, NAME@7 or base.", offered=policies)] = "base",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    system: Annotated[str | None, option("What the chat template is told first; means --chat.")] = None,
    max_tokens: Annotated[int, option("End after so many tokens.")] = MAX_TOKENS,
    temperature: Annotated[float | None, option("0 is greedy.", "1.0")] = None,
    top_p: Annotated[float | None, option("Keep the likeliest tokens of this mass.")] = None,
    top_k: Annotated[int | None, option("Keep so many tokens.")] = None,
    min_p: Annotated[float | None, option("Keep tokens of this share of the likeliest one's probability.")] = None,
    seed: Annotated[int | None, option("Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    url: Url = None,
    model: Model = None,
    revision: Revision = None,
    adapters: Adapters = None,
    json_output: Json = False,
) -> None:
    """Print what a policy says to a prompt, as it comes: of a running server, or with --model of one started for it."""
    with one_sentence():
        # The line end that closes a piped line is not part of the prompt.
        text = sys.stdin.read().removesuffix("\n") if prompt in (None, "-") else prompt
        asked: dict[str, Any] = {"model": policy, "max_tokens": max_tokens}
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
        asked |= {name: value for name, value in sampling.items() if value is not None}
        asked |= {"stop": stop} if stop else {}
        in_chat = chat or system is not None
        if in_chat:
            first = [] if system is None else [{"role": "system", "content": system}]
            asked["messages"] = [*first, {"role": "user", "content": text}]
        else:
            asked["prompt"] = text
        with client_of(url, model, revision, adapters) as client:
            from rollout_server.commands.asking.sse_client import completion_stream

            said = read(client.stream(completion_stream(asked, chat=in_chat)), aloud=not json_output)
        if json_output:
            return print_json(said.as_json())
        if sys.stderr.isatty():
            typer.echo(f"[{said.summary()}]", err=True)


@dataclass
class Said:
    """A completion, put together from its stream."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[Any] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        ending = {name: self.end.get(name) for name in ("finish_reason", "stop_reason")}
        found = {"text": "".join(self.text), **ending, "versions": self.versions}
        found |= {"reasoning": "".join(self.reasoning)} if self.reasoning else {}
        found |= {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return found | {"usage": self.usage, "seconds": self.seconds}

    @property
    def versions(self) -> list[dict[str, Any]]:
        return (self.end.get("rollout") or {}).get("versions") or []

    def summary(self) -> str:
        tokens = self.usage.get("completion_tokens", 0)
        names = ", ".join(f"{span['policy']}@{span['version']}" for span in self.versions)
        rate = tokens / self.seconds if self.seconds else 0.0
        return f"{names}: {tokens} tokens in {self.seconds:.2f} s, {rate:.0f} tokens/s, {self.end.get('finish_reason')}"


def read(events: Iterable[dict[str, Any]], *, aloud: bool) -> Said:
    """Reads a stream to its end; `aloud` writes its text to standard output as it comes."""
    on_terminal = sys.stdout.isatty()
    said, started = Said(), time.perf_counter()
    for event in events:
        said.usage = event.get("usage") or said.usage
        for choice in event["choices"]:
            delta = choice.get("delta") or {}
            piece = choice.get("text") or delta.get("content") or ""
            said.text.append(piece)
            said.reasoning.append(delta.get("reasoning_content") or "")
            said.tool_calls += delta.get("tool_calls") or []
            if choice["finish_reason"] is not None:
                said.end = choice
            if aloud:
                typer.echo(harmless(piece) if on_terminal else piece, nl=False)
    said.seconds = time.perf_counter() - started
    said.reasoning = [piece for piece in said.reasoning if piece]
    if aloud:
        typer.echo()
    return said


def harmless(text: str) -> str:
    """What a terminal may be sent: a model can write escape sequences as well as anybody."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)
