"""`rollout-server bench`."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout_server.commands.asking.server_choice import Model, Revision, one_of
from rollout_server.commands.terminal.command_options import (
    Json,
    Url,
    address,
    connected,
    one_sentence,
    option,
    print_json,
)
from rollout_server.commands.terminal.completing import policies
from rollout_server.commands.terminal.progress import Progress

if TYPE_CHECKING:
    from rollout_server.commands.asking.load_test import Level, Plan
    from trainer_client import RolloutClient

OWN = ("model", "revision", "served_model_name", "adapters", "host", "port", "api_key", "admin_key", "state_dir")
"""Variables of the user's own server that are not those of one that is started to be measured."""
LOAD_S = 1800.0
"""Seconds to wait for a model to be read."""
Clients = Annotated[str, typer.Option(help="Numbers of clients, one after another.", metavar="N[,N…]")]


def bench(
    clients: Clients = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of each reply.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Requests that each client sends.")] = 2,
    policy: Annotated[str, option("Address of the policy.", offered=policies)] = "base",
    adapter: Annotated[Path | None, option("Also time pushes of this adapter.", metavar="DIR")] = None,
    pushes: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    url: Url = None,
    model: Model = None,
    revision: Revision = None,
    json_output: Json = False,
) -> None:
    """Measure a server as it is: tokens a second under clients that stream and under rollouts, latencies, pushes.

    With --model a server is started in a process of its own, with the limits that ROLLOUT_<NAME> sets. Random prompts;
    every row runs to its full length."""
    from rollout_server.commands.asking.load_test import Plan

    with one_sentence():
        one_of(url, model, revision, None)
        levels = numbers(clients)
        plan = Plan(policy, prompt_tokens, max_tokens, rounds, seed)
        with started(model, revision) as own, connected(own or url) as client:
            result = run(client, plan, levels, None if adapter is None else (adapter, pushes))
        if json_output:
            return print_json(result)
        show(result)


def numbers(text: str) -> list[int]:
    """`1,8,32` → numbers. Raises ValueError for anything else."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(f"--clients is {text!r}, but takes numbers from 1 on with commas between them, as 1,8,32")
    return found


@contextmanager
def started(model: str | None, revision: str | None) -> Iterator[str | None]:
    """The address of a server of `model` in a process of its own, so that the clients here cost it nothing."""
    if model is None:
        yield None
        return
    from rollout_server import logs
    from rollout_server.demo.run import ending_in_order, serving
    from rollout_server.model_source.model_files import resolve_model

    logs.configure()
    path, name = resolve_model(model, revision)
    # The server's log is shown if it fails.
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as folder:
        options = ["--model", str(path), "--served-model-name", name]
        log = Path(folder) / "server.log"
        with ending_in_order(), serving(log, options, unset=OWN, start_s=LOAD_S) as address:
            yield address


def run(client: RolloutClient, plan: Plan, levels: list[int], pushed: tuple[Path, int] | None) -> dict[str, Any]:
    from rollout_server.commands.asking.load_test import Prompts, measure
    from rollout_server.commands.asking.load_test import pushes as time_pushes
    from trainer_client import AsyncRolloutClient, Retry

    began = time.perf_counter()
    served = client.models()
    prompts = Prompts(served[0], plan)
    measured: list[Level] = []

    async def each() -> None:
        # A request that is refused is to be seen, not tried again.
        async with AsyncRolloutClient(client.url, api_key=address(client.url)[1], retry=Retry(attempts=1)) as streaming:
            for number in levels:
                progress.begin(f"{number} clients")
                measured.append(await measure(streaming, plan, prompts, number))
                progress.done(f"{number} clients: {measured[-1].tokens_per_s:.0f} tokens/s")

    with Progress(len(levels) + (pushed is not None)) as progress:
        asyncio.run(each())
        pushing = None
        if pushed is not None:
            progress.begin("pushes")
            pushing = time_pushes(client, *pushed)
            progress.done(f"pushes: {pushing['p50_ms']:.1f} ms")
    return {
        "url": client.url,
        "model": served[1].id if len(served) > 1 else served[0].id,
        "dtype": served[0].dtype,
        "policy": plan.policy,
        "prompt_tokens": plan.prompt_tokens,
        "max_tokens": plan.max_tokens,
        "levels": [level.as_json() for level in measured],
        "push": pushing,
        "seconds": time.perf_counter() - began,
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['model']} ({result['dtype']}), {result['prompt_tokens']} + {result['max_tokens']} tokens a row"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("clients", "tok/s", "first token p50", "p95", "reply p50", "p95", "rollouts tok/s"):
        table.add_column(name, justify="right")
    for level in result["levels"]:
        times = [level[f"{what}_{part}_s"] for what in ("first_token", "latency") for part in ("p50", "p95")]
        table.add_row(
            str(level["clients"]),
            f"{level['tokens_per_s']:.0f}",
            *(f"{seconds * 1e3:.0f} ms" for seconds in times),
            f"{level['rollouts_tokens_per_s']:.0f}",
        )
    console = Console(highlight=False)
    console.print(table)
    if (push := result["push"]) is not None:
        console.print(f"push: {push['p50_ms']:.1f} ms, at most {push['max_ms']:.1f} ms, of {push['count']}")
