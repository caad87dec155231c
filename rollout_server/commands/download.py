"""`rollout-server download`."""

from __future__ import annotations

from typing import Annotated

import typer

from rollout_server.commands.terminal.command_options import Json, one_sentence, option, print_json


def download(
    model: Annotated[str, typer.Argument(help="Hub id, as OWNER/NAME.", metavar="ID")],
    revision: Annotated[str | None, option("Branch, tag or commit.", "the main branch")] = None,
    json_output: Json = False,
) -> None:
    """Fetch a model of the Hugging Face Hub into the cache, from which `serve --model ID` reads it, offline too.

    HF_TOKEN opens gated and private models, HF_HOME says where the cache is. What was fetched before is not fetched
    again. Prints the directory."""
    with one_sentence():
        from rollout_server import logs
        from rollout_server.model_source import hub
        from rollout_server.model_source.model_files import check_files

        logs.configure()
        directory = hub.fetch(model, revision)
        check_files(directory, model)
        files = [path for path in directory.rglob("*") if path.is_file()]
        if json_output:
            found = {"model": model, "revision": revision or "main", "commit": directory.name, "path": str(directory)}
            return print_json(found | {"files": len(files), "bytes": sum(path.stat().st_size for path in files)})
        typer.echo(directory)
