"""`rollout-server fleet list | drain | restart | remove`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from rollout_server.commands.terminal.command_options import Json, Url, connected, one_sentence, option, print_json
from rollout_server.errors import EngineUnavailable
from trainer_client import RolloutClient

WITHIN_S, LOOK_S = 600.0, 0.2

app = typer.Typer(help="List the engines behind a server; let one go, or start them anew one by one.")


@app.command("list")
def list_replicas(url: Url = None, json_output: Json = False) -> None:
    """List the replicas, what they do, and how many versions they have."""
    with one_sentence(), connected(url) as client:
        replicas = client.fleet()
        if json_output:
            return print_json({"replicas": list(replicas)})
        if not replicas:
            typer.echo("The server computes in its own process.")
        for replica in replicas:
            process = f", process {replica.pid}" if replica.pid else ""
            where = replica.device or ("no process" if replica.state == "dead" else "loading")
            typer.echo(
                f"{replica.id}  {replica.state}  {replica.rows} rows  {replica.versions_staged} versions  "
                f"seen {replica.last_seen_s:.1f} s ago  {replica.restarts} restarts  ({where}{process})"
            )


@app.command("drain")
def drain_replica(
    replica: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")],
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Give REPLICA no more rows, and end it when it has none."""
    with one_sentence(), connected(url) as client:
        client.drain_replica(replica)
        if json_output:
            return print_json({"drained": replica})
        typer.echo(f"{replica} gets no more rows and goes when it has none")


@app.command("remove")
def remove_replica(
    replica: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")],
    url: Url = None,
    json_output: Json = False,
) -> None:
    """End REPLICA at once. Its rows are drawn again elsewhere."""
    with one_sentence(), connected(url) as client:
        client.remove_replica(replica)
        if json_output:
            return print_json({"removed": replica})
        typer.echo(f"{replica} is ended")


@app.command("restart")
def restart_replicas(
    replica: Annotated[str | None, typer.Argument(help="Its id, as `list` shows it; without it each in turn.")] = None,
    url: Url = None,
    within: Annotated[float, option("Seconds that one may take to finish, load and be live.", "600")] = WITHIN_S,
    json_output: Json = False,
) -> None:
    """Start the replicas anew, one after the other: each finishes what it has, and is live again before the next goes.
    Nobody who asks the server notices."""
    with one_sentence(), connected(url) as client:
        wanted = [known for known in client.fleet() if replica in (None, known.id)]
        if replica is not None and not wanted:
            client.restart_replica(replica)  # The server says that it has none of this id.
        again = {}
        for known in wanted:
            if replica is None and known.state == "dead":
                typer.echo(f"{known.id} is dead, and is left alone", err=json_output)
                continue
            typer.echo(f"{known.id} finishes what it has", err=json_output)
            client.restart_replica(known.id)
            again[known.id] = _live_again(client, known.id, known.restarts, within)
            typer.echo(f"{known.id} is live again after {again[known.id]:.1f} s", err=json_output)
        if json_output:
            print_json({"restarted": [{"id": id, "seconds": round(took, 3)} for id, took in again.items()]})


def _live_again(client: RolloutClient, id: str, restarts: int, within_s: float) -> float:
    """Seconds until a replica is live that was started anew. Raises `EngineUnavailable` where that takes too long."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        if any(each.id == id and each.restarts > restarts and each.state == "live" for each in client.fleet()):
            return time.monotonic() - began
        time.sleep(LOOK_S)
    raise EngineUnavailable(
        f"{id} is not live again after {within_s:g} s, so the others were left alone: rollout-server fleet list shows "
        "its state, and its log says why."
    )
