"""What a shell is offered behind TAB of the names that a running server knows.

`rollout-server --install-completion` writes the shell's own part. Values of an option are offered by `option`, and
paths need nothing: where nothing is offered, the shell completes them itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import typer

from rollout_server.commands.terminal.command_options import address

ANSWER_S = 1.0
"""Longest wait for a server: somebody has pressed TAB."""


def policies(ctx: typer.Context, incomplete: str) -> list[str]:
    """`base`, `NAME` and `NAME@3` of the server that the command will ask."""
    known = ("base", *(address for name, numbers in _kept(ctx) for address in _addresses(name, numbers)))
    return [address for address in known if address.startswith(incomplete)]


def names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names that have versions: of the first model, or where the command has been told --model, that one's."""
    model = ctx.params.get("model")
    own = [name if model is None else name.rpartition("/")[2] for name, _ in _kept(ctx, model)]
    return [name for name in own if name.startswith(incomplete)]


def versions(ctx: typer.Context, incomplete: str) -> list[str]:
    """Numbers of the versions that are kept of the name given before."""
    numbers = dict(_kept(ctx)).get(str(ctx.params.get("name")), [])
    return [str(number) for number in numbers if str(number).startswith(incomplete)]


def _addresses(name: str, numbers: list[int]) -> Iterator[str]:
    yield name
    yield from (f"{name}@{number}" for number in numbers)


def _kept(ctx: typer.Context, model: str | None = None) -> list[tuple[str, list[int]]]:
    """Names and numbers, newest first; nothing where no server answers at once: a shell shows no errors."""
    from trainer_client import Retry, RolloutClient, TrainerClientError

    try:
        where, key = address(ctx.params.get("url"))
        with RolloutClient(where, api_key=key, timeout_s=ANSWER_S, retry=Retry(attempts=1)) as client:
            lines = client.weights(model)
    except (TrainerClientError, ValueError):
        return []
    return [(line.name, sorted((kept.version for kept in line.versions), reverse=True)) for line in lines]
