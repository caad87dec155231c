"""`rollout-server fleet list | drain | remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from rollout_server.commands.terminal.command_options import Json, Url, connected, one_sentence, print_json

app = typer.Typer(help="List the engines behind a server; let one finish and go, or end it.")


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
            where = f"{replica.device or 'loading'}, process {replica.pid}" if replica.pid else "no process"
            typer.echo(
                f"{replica.id}  {replica.state}  {replica.rows} rows  {replica.versions_staged} versions  "
                f"seen {replica.last_seen_s:.1f} s ago  {replica.restarts} restarts  ({where})"
            )


@app.command("drain")
def drain_replica(
    replica: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")],
    url: Url = None,
) -> None:
    """Give REPLICA no more rows, and end it when it has none."""
    with one_sentence(), connected(url) as client:
        client.drain_replica(replica)
        typer.echo(f"{replica} gets no more rows and goes when it has none")


@app.command("remove")
def remove_replica(
    replica: Annotated[str, typer.Argument(help="Its id, as `list` shows it.")],
    url: Url = None,
) -> None:
    """End REPLICA at once. Its rows are drawn again elsewhere."""
    with one_sentence(), connected(url) as client:
        client.remove_replica(replica)
        typer.echo(f"{replica} is ended")
