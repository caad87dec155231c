"""`rollout-server push`, and `rollout-server weights list | activate | delete | export`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rollout_server.commands.terminal.command_options import Json, Url, connected, one_sentence, print_json
from rollout_server.commands.terminal.completing import names, versions

if TYPE_CHECKING:
    from trainer_client import PolicyLine

app = typer.Typer(help="List policies and their versions; move a name, delete, export.")


def push(
    directory: Annotated[
        Path, typer.Argument(help="An adapter as PEFT or mlx-lm saves it.", exists=True, file_okay=False)
    ],
    name: Annotated[
        str, typer.Option(help="The policy it becomes a version of; of another model MODEL/NAME.", autocompletion=names)
    ],
    label: Annotated[str | None, typer.Option(help="Your own mark, at most 64 characters.")] = None,
    activate: Annotated[bool, typer.Option(help="Move the name to the new version.")] = True,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Publish an adapter directory as a new version of NAME."""
    with one_sentence(), connected(url) as client:
        with warnings.catch_warnings(record=True, action="always") as told:
            pushed = client.push(name, directory, label=label, activate=activate)
        for warning in told:
            typer.echo(f"rollout-server: {warning.message}", err=True)
        if json_output:
            return print_json(pushed)
        done = "unchanged" if pushed.unchanged else "live" if pushed.live else "staged"
        typer.echo(f"{pushed.name}@{pushed.version} {done}: {pushed.digest}")


@app.command("list")
def list_weights(
    name: Annotated[
        str | None, typer.Argument(help="One policy; without it all of them.", autocompletion=names)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Those of another model than that of --model.")] = None,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """List the policies, their versions and which one is live."""
    with one_sentence(), connected(url) as client:
        lines = [client.policy(name, model=model)] if name else list(client.weights(model))
        if json_output:
            return print_json({"policies": lines})
        _print_policies(lines)


@app.command("activate")
def activate_weights(
    name: Annotated[str, typer.Argument(help="The policy.", autocompletion=names)],
    version: Annotated[int, typer.Argument(min=1, help="The number of a kept version.", autocompletion=versions)],
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Move NAME to a version that is kept: promote, or roll back."""
    with one_sentence(), connected(url) as client:
        moved = client.activate(name, version)
        if json_output:
            return print_json(moved)
        typer.echo(f"{name}@{version} is live")


@app.command("delete")
def delete_weights(
    name: Annotated[str, typer.Argument(help="The policy.", autocompletion=names)],
    version: Annotated[
        int | None, typer.Argument(min=1, help="One version; it must not be live.", autocompletion=versions)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The name and all its versions.")] = False,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Delete one version of NAME, or with --all the whole name. Rows that still use them run on."""
    with one_sentence(), connected(url) as client:
        if everything == (version is not None):
            raise ValueError("name one version to delete, or say --all for the whole name")
        gone = client.delete_policy(name) if version is None else client.delete(name, version)
        if json_output:
            return print_json(gone)
        typer.echo(f"deleted {', '.join(f'{name}@{number}' for number in gone.versions)}")


@app.command("export")
def export_weights(
    name: Annotated[str, typer.Argument(help="The policy.", autocompletion=names)],
    version: Annotated[int, typer.Argument(min=1, help="The number of a kept version.", autocompletion=versions)],
    directory: Annotated[Path, typer.Argument(help="Where the two files go; it is made.", file_okay=False)],
    format: Annotated[
        Literal["peft", "mlx"] | None, typer.Option(help="Whose files to write; of dense versions mlx takes kind full.")
    ] = None,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Write a version as the adapter directory that PEFT or mlx-lm loads."""
    with one_sentence(), connected(url) as client:
        exported = client.export(name, version, format=format)
        exported.save(directory)
        if json_output:
            done = {"name": name, "version": version, "digest": exported.digest, "format": exported.format}
            return print_json(done | {"directory": str(directory), "bytes": len(exported.body)})
        typer.echo(f"{directory} holds {name}@{version}: {exported.digest}")


def _print_policies(lines: list[PolicyLine]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("version", "live", "label", "kind", "rows", "MiB", "digest", box=None, pad_edge=False)
    for line in lines:
        for kept in line.versions:
            table.add_row(
                f"{line.name}@{kept.version}",
                "live" if kept.live else "",
                kept.label or "",
                kept.kind or "",
                str(kept.rows_in_use),
                "" if kept.nbytes is None else f"{kept.nbytes / 2**20:.1f}",
                kept.digest[:19],
            )
    Console(highlight=False).print(table if table.row_count else "No adapter has been pushed.")
