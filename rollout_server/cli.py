"""The command line: `rollout-server COMMAND …`. Each command is a module of `rollout_server.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

from rollout_server import __version__
from rollout_server.commands import bench, demo, doctor, download, generate, perplexity, score, serve, top
from rollout_server.commands.running import fleet, weights

COMMANDS = (
    serve.serve,
    demo.demo,
    weights.push,
    download.download,
    generate.generate,
    perplexity.perplexity,
    score.score,
    top.top,
    bench.bench,
    doctor.doctor,
)
GROUPS = {"weights": weights.app, "fleet": fleet.app}


def main() -> None:
    """Entry point of the `rollout-server` script."""
    app()


def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"rollout-server {__version__}")
        raise typer.Exit


def make_app() -> typer.Typer:
    made = typer.Typer(
        name="rollout-server",
        help="A rollout service for reinforcement learning on MLX.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        callback=root,
    )
    for command in COMMANDS:
        made.command()(command)
    for name, group in GROUPS.items():
        made.add_typer(group, name=name)
    return made


app = make_app()
