"""`rollout-server score`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from rollout_server.commands.asking.server_choice import Adapters, Model, Revision, client_of
from rollout_server.commands.terminal.command_options import Json, Url, one_sentence, option, print_json
from rollout_server.commands.terminal.completing import policies

if TYPE_CHECKING:
    from trainer_client import PolicyRef, Rewards, RolloutClient

SHOWN = 60
"""Characters of a text that stand beside its score."""
AT_ONCE = 256
"""Sequences of one request."""


def score(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without them and --file, lines of standard input.")
    ] = None,
    policy: Annotated[
        str | None, option("Address of the reward model or classifier.", "the one that scores", offered=policies)
    ] = None,
    file: Annotated[
        str | None,
        option("A text in each line; of a .jsonl file text, messages, token ids or an object.", metavar="FILE"),
    ] = None,
    query: Annotated[str | None, option("Order the texts by how well they answer this.")] = None,
    steps: Annotated[
        str | None,
        option(
            "Also, or of a process reward model only, the score of each step: the text that ends one, or as the route "
            "has it {token_id, text or positions}.",
            metavar="TEXT_OR_JSON",
        ),
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="What the model makes of its scores.")] = False,
    url: Url = None,
    model: Model = None,
    revision: Revision = None,
    adapters: Adapters = None,
    json_output: Json = False,
) -> None:
    """Score texts with a reward model or a classifier, or order them with --query: by a running server, or with --model
    by one started for it."""
    with one_sentence():
        asked = read_texts(texts or [], file)
        where = read_steps(steps, len(asked), query)
        with client_of(url, model, revision, adapters) as client:
            if query is not None:
                return rank(client, query, asked, policy, json_output=json_output)
            activation: Literal["none", "model"] = "model" if probabilities else "none"
            found = list(in_parts(client, asked, policy, where, activation))
        if json_output:
            return print_json(as_json(found))
        for text, (row, own) in zip(asked, numbers(found), strict=True):
            shown_steps = [" ".join(",".join(f"{value:.6g}" for value in step) for step in own or ())] if where else []
            typer.echo("\t".join([*(f"{value:.6g}" for value in row or ()), *shown_steps, shown(text)]))


def read_texts(texts: list[str], file: str | None) -> list[Any]:
    """What is to be scored. Raises ValueError where there is nothing, or two sources."""
    if texts and file is not None:
        raise ValueError("texts and --file are two sources: give one of the two")
    if texts:
        return list(texts)
    raw = sys.stdin.read() if file in (None, "-") else Path(str(file)).expanduser().read_text("utf-8")
    lines = [line for line in raw.split("\n") if line.strip()]
    if not lines:
        raise ValueError("there is no text to score")
    return [_entry(line, number) for number, line in enumerate(lines, 1)] if str(file).endswith(".jsonl") else lines


def _entry(line: str, number: int) -> Any:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from None
    if not isinstance(entry, str | list | dict) or not entry:
        raise ValueError(f"line {number} is no text, no list of messages or token ids, and no object")
    return entry


def read_steps(steps: str | None, count: int, query: str | None) -> dict[str, Any] | None:
    """`steps` of `/v1/rewards`, for so many sequences. Raises ValueError for what no request can say."""
    if steps is None:
        return None
    if query is not None:
        raise ValueError("--query orders texts as a whole: leave --steps out")
    if not steps.startswith("{"):
        return {"text": steps}
    try:
        found = json.loads(steps)
    except ValueError as error:
        raise ValueError(f"--steps begins like JSON and is none: {error}") from None
    positions = found.get("positions")
    if isinstance(positions, list) and len(positions) != count:
        raise ValueError(f"--steps has positions for {len(positions)} sequences, and there are {count}")
    return dict(found)


def steps_in(steps: dict[str, Any] | None, part: slice) -> dict[str, Any] | None:
    """Those of one request's sequences."""
    positions = (steps or {}).get("positions")
    return {**(steps or {}), "positions": positions[part]} if isinstance(positions, list) else steps


def in_parts(
    client: RolloutClient,
    asked: list[Any],
    policy: str | None,
    steps: dict[str, Any] | None,
    activation: Literal["none", "model"],
) -> Iterator[Rewards]:
    """The replies of as many requests as it takes. The version that gave the first gives all: scores of two versions
    are not of one kind, and one of them is told."""
    model: str | PolicyRef | None = policy
    for at in range(0, len(asked), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        found = client.rewards(asked[part], model=model, steps=steps_in(steps, part), activation=activation)
        yield found
        model = found.version


def rank(client: RolloutClient, query: str, texts: list[Any], policy: str | None, *, json_output: bool) -> None:
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("--query orders texts, and the file holds something else")
    ranked = client.rerank(query, texts, model=policy)
    if json_output:
        print_json({"results": [{"index": each.index, "relevance_score": each.score} for each in ranked]})
        return
    for each in ranked:
        typer.echo(f"{each.score:.6g}\t{shown(texts[each.index])}")


def numbers(found: list[Rewards]) -> Iterator[tuple[list[float] | None, list[list[float]] | None]]:
    """(Scores of the whole, scores of each step) of every sequence; None for what was not asked for."""
    for rewards in found:
        for index, row in enumerate(rewards.scores):
            steps = None if rewards.step_scores is None else rewards.steps(index).tolist()
            yield None if np.isnan(row).all() else row.tolist(), steps


def as_json(found: list[Rewards]) -> dict[str, Any]:
    """One object for all requests; a value is null where there are several labels, or steps alone."""
    first = found[0]
    single = len(first.labels) == 1
    return {
        "rewards": [
            {"value": row[0] if row and single else None, "scores": row, **({} if steps is None else {"steps": steps})}
            for row, steps in numbers(found)
        ],
        "labels": first.labels,
        "policy": first.version.name,
        "version": first.version.version,
        "digest": first.version.digest,
    }


def shown(text: Any) -> str:
    """One line of a terminal, whatever the text holds."""
    line = " ".join(str(text).split())
    line = "".join(letter if letter.isprintable() else "·" for letter in line)
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
