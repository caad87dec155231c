"""`rollout-server demo`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from rollout_server.commands.terminal.command_options import Json, load_blas, one_sentence


def demo(
    output: Annotated[Path, typer.Option(help="Folder for result.json, reward.png and the adapter.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; default is what it takes.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of problems, samples and the adapter.")] = 0,
    json_output: Json = False,
) -> None:
    """Train the embedded model with GRPO against a real server, over HTTP alone, and show what it learned."""
    # Its two processes are ended on the way out; a plain SIGTERM would leave them running.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with one_sentence():
        typer.echo(load_blas(), err=True)

        from rollout_server.demo.run import run_demo

        run_demo(output, steps, seed, json_output)
