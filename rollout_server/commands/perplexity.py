"""`rollout-server perplexity`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout_server.commands.asking.server_choice import Adapters, Model, Revision, client_of
from rollout_server.commands.terminal.command_options import Json, Url, one_sentence, option, print_json
from rollout_server.commands.terminal.completing import policies
from rollout_server.commands.terminal.progress import Progress

if TYPE_CHECKING:
    from trainer_client import PolicyRef, RolloutClient

WINDOW = 2048
PIECE = 1_000_000
"""Characters that are tokenized at once: every server takes as many in one request."""
TOKENS_AT_ONCE = 16_384
"""Windows of one request: enough to fill the server's batch, few enough to see how it goes."""


def perplexity(
    file: Annotated[str, typer.Argument(help="UTF-8 text; `-` is standard input.")],
    policy: Annotated[str, option("Address of the policy, as NAME, NAME@7 or base.", offered=policies)] = "base",
    window: Annotated[int | None, option("Tokens read at once.", f"the context, at most {WINDOW}")] = None,
    stride: Annotated[int | None, option("Tokens from one window to the next.", "half a window")] = None,
    url: Url = None,
    model: Model = None,
    revision: Revision = None,
    adapters: Adapters = None,
    json_output: Json = False,
) -> None:
    """Say how well a policy predicts a text: perplexity, of a running server, or with --model of one started for it.

    Texts longer than a window are read in overlapping ones. Every token but the first counts once, in the first window
    that holds it, so it is predicted from at least window - stride tokens before it, or from all there are. The smaller
    the stride, the better the prediction and the longer it takes. A text of more than a million characters is tokenized
    in parts that end where a line does."""
    with one_sentence():
        text = read_text(file)
        with client_of(url, model, revision, adapters) as client:
            began = time.perf_counter()
            tokens = tokenize(client, text)
            context = client.models()[0].max_model_len or WINDOW
            plan = Windows.of(len(tokens), window or min(context, WINDOW), stride, context)
            measured = measure(client, policy, tokens, plan)
            seconds = time.perf_counter() - began
        read = {"window": plan.window, "stride": plan.stride, "windows": len(list(plan)), "seconds": seconds}
        result = as_json(measured, len(text.encode())) | read
        if json_output:
            return print_json(result)
        typer.echo(summary(measured, result))


def read_text(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start} cannot be read") from error


@dataclass(frozen=True, slots=True)
class Windows:
    """How `length` tokens are read."""

    length: int
    window: int
    stride: int

    @classmethod
    def of(cls, length: int, window: int, stride: int | None, context: int) -> Windows:
        """Raises ValueError for what cannot be read so."""
        if length < 2:
            raise ValueError("the text has fewer than two tokens, so nothing of it can be predicted")
        if not 2 <= window <= context:
            raise ValueError(f"--window is {window}; it is 2 to {context} tokens, the context of this model")
        stride = max(1, window // 2) if stride is None else stride
        if not 1 <= stride < window:
            raise ValueError(f"--stride is {stride}; it is 1 to {window - 1} tokens, less than the window of {window}")
        return cls(length, window, stride)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(begin, scored from, end) of each window; what is scored tiles all tokens but the first."""
        scored = begin = 0
        while scored < self.length:
            end = min(begin + self.window, self.length)
            yield begin, max(scored, 1), end
            scored, begin = end, begin + self.stride

    @property
    def batches(self) -> list[list[tuple[int, int, int]]]:
        """What is asked for at once."""
        every, count = list(self), max(1, TOKENS_AT_ONCE // self.window)
        return [every[at : at + count] for at in range(0, len(every), count)]


@dataclass(frozen=True, slots=True)
class Measured:
    """The negative log-probabilities of `tokens` tokens under one version, summed; nats."""

    version: PolicyRef
    tokens: int
    total: float

    @property
    def nll(self) -> float:
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


def pieces(text: str) -> Iterator[str]:
    """The text in parts of at most `PIECE` characters, each cut behind the last line that ends in it; one without lines
    is cut where it is full."""
    begin = 0
    while len(text) - begin > PIECE:
        end = text.rfind("\n", begin, begin + PIECE) + 1 or begin + PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def tokenize(client: RolloutClient, text: str) -> list[int]:
    """Token ids as the server reads a prompt, with the special tokens that its tokenizer adds; of a text in parts, with
    those of the first."""
    return [id for index, piece in enumerate(pieces(text)) for id in _tokens(client, piece, special=index == 0)]


def _tokens(client: RolloutClient, piece: str, *, special: bool) -> list[int]:
    from trainer_client.wire.call import Body, Call
    from trainer_client.wire.replies import Reply, need, parse_json

    def parse(reply: Reply) -> list[int]:
        ids: list[int] = need(parse_json(reply.body), "tokens", list)
        return ids

    body = Body((json.dumps({"prompt": piece, "add_special_tokens": special}).encode(),))
    headers = {"content-type": "application/json"}
    call = Call(method="POST", path="/tokenize", parse=parse, headers=headers, body=body, idempotent=True)
    return client.send(call)


def measure(client: RolloutClient, policy: str, tokens: list[int], plan: Windows) -> Measured:
    """All windows are read under the version that the policy means at the first."""
    batches = plan.batches
    with Progress(len(batches)) as progress:
        return _sum(client, policy, tokens, batches, progress)


def _sum(
    client: RolloutClient,
    policy: str,
    tokens: list[int],
    batches: list[list[tuple[int, int, int]]],
    progress: Progress,
) -> Measured:
    import numpy as np

    total, count, address, version = 0.0, 0, policy, None
    for batch in batches:
        progress.begin(f"perplexity of {policy}")
        asked: list[dict[str, Any]] = [
            {"token_ids": tokens[begin:end], "start": first - begin} for begin, first, end in batch
        ]
        scored = client.logprobs(asked, policy=address)
        total -= float(scored.logprobs.sum(dtype=np.float64))
        count += scored.logprobs.size
        (version,) = scored.versions
        address = f"{version.name}@{version.version}"
        progress.done(f"{batch[-1][2]} of {len(tokens)} tokens read: {total / count:.4f} nats a token")
    if version is None:
        raise ValueError("there is nothing to read")
    return Measured(version, count, total)


def as_json(measured: Measured, size: int) -> dict[str, Any]:
    """`size` in bytes of UTF-8. A token of probability zero makes values infinite, which are null."""
    values = {
        "nll": measured.nll,
        "perplexity": measured.perplexity,
        "bits_per_byte": measured.total / math.log(2) / size,
    }
    version = measured.version
    return {
        "policy": version.name,
        "version": version.version,
        "digest": version.digest,
        "tokens": measured.tokens,
        "bytes": size,
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
    }


def summary(measured: Measured, result: dict[str, Any]) -> str:
    version = measured.version
    values = "" if result["bits_per_byte"] is None else f", {result['bits_per_byte']:.4f} bits a byte"
    return (
        f"{version.name}@{version.version}: perplexity {measured.perplexity:.4f}, {measured.nll:.4f} nats a token"
        f"{values}, over {measured.tokens} tokens"
    )
