"""The command line: `rollout-server serve | demo | push | weights | doctor`.

Every command that computes loads its BLAS first; everything heavy is imported inside the command that needs it, so that
`--help` and `push` start without mlx. Errors are one sentence on standard error and exit status 1.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from rollout_server import __version__
from rollout_server.errors import RolloutError

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

    from rollout_server.blas import BlasChoice
    from rollout_server.config import ServerConfig
    from trainer_client import PolicyLine, RolloutClient

    S = TypeVar("S", bound=BaseSettings)

log = logging.getLogger("rollout_server")

app = typer.Typer(
    name="rollout-server",
    help="A rollout service for reinforcement learning on MLX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
weights_app = typer.Typer(help="List policies and their versions; move a name, delete, export.")
app.add_typer(weights_app, name="weights")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Url = Annotated[str | None, typer.Option(help="The server; default is ROLLOUT_HOST and ROLLOUT_PORT.", metavar="URL")]


def main() -> None:
    """Entry point of the `rollout-server` script."""
    app()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"rollout-server {__version__}")
        raise typer.Exit


# ---- serve and demo -----------------------------------------------------------------------------------------------


def option(text: str, default: str | None = None, metavar: str | None = None) -> Any:
    """An option that is None when not given: environment and configuration decide, help names their default."""
    return typer.Option(help=f"{text} Default: {default}." if default else text, metavar=metavar)


@app.command()
def serve(
    ctx: typer.Context,
    model: Annotated[str | None, option("Directory or Hub id; without it the embedded demo model.")] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="Publish at the start; repeatable.", metavar="NAME=DIR")
    ] = None,
    served_model_name: Annotated[str | None, option("What the base is called, besides `base`.")] = None,
    revision: Annotated[str | None, option("Branch, tag or commit of a Hub id.")] = None,
    context_length: Annotated[int | None, option("Tokens of prompt and reply; at most the model's.")] = None,
    host: Annotated[str | None, option("Address to listen on; loopback unless keys are set.", "127.0.0.1")] = None,
    port: Annotated[int | None, option("Port to listen on; 0 takes a free one.", "8000")] = None,
    max_batch: Annotated[int | None, option("Rows that decode together.", "64")] = None,
    kv_memory: Annotated[str | None, option("For keys and values, as 512MB or 2GiB.", metavar="SIZE")] = None,
    prefix_cache: Annotated[
        str | None, option("Keep KV for later requests with the same beginning.", "on", metavar="on|off")
    ] = None,
    weights_memory: Annotated[str | None, option("For adapter versions.", metavar="SIZE")] = None,
    max_queue: Annotated[int | None, option("Requests open at once; more are answered 429.", "4096")] = None,
    max_rows_per_request: Annotated[int | None, option("More in one request are answered 400.", "65536")] = None,
    keep_versions: Annotated[int | None, option("Newest versions kept of each name.", "8")] = None,
    state_dir: Annotated[
        str | None, option("Where versions outlive a restart; one server each.", metavar="DIR")
    ] = None,
    max_upload: Annotated[str | None, option("Largest upload of weights.", "2GiB", metavar="SIZE")] = None,
    max_body: Annotated[str | None, option("Largest other request body.", "64MiB", metavar="SIZE")] = None,
    log_format: Annotated[str | None, option("How the log is written.", "text", metavar="text|json")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without keys.")] = None,
) -> None:
    """Serve one base model: rollouts, completions, log-probabilities, weights.

    What is not given here is taken from ROLLOUT_<NAME> in the environment, then from the defaults. Keys come from
    ROLLOUT_API_KEY and ROLLOUT_ADMIN_KEY only.
    """
    given = {name: value for name, value in ctx.params.items() if value not in (None, [])}
    with one_sentence():
        blas = _load_blas()
        config = configure(given)

        from rollout_server import logs

        logs.configure(config.log_format)
        log.log(logging.WARNING if blas.missing else logging.INFO, "%s", blas)

        from rollout_server.http.server import serve as serve_http

        serve_http(config)


@app.command()
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
        typer.echo(_load_blas(), err=True)

        from rollout_server.demo.run import run_demo

        run_demo(output, steps, seed, json_output)


# ---- weights ------------------------------------------------------------------------------------------------------


@app.command()
def push(
    directory: Annotated[
        Path, typer.Argument(help="An adapter as PEFT or mlx-lm saves it.", exists=True, file_okay=False)
    ],
    name: Annotated[str, typer.Option(help="The policy it becomes a version of.")],
    label: Annotated[str | None, typer.Option(help="Your own mark, at most 64 characters.")] = None,
    activate: Annotated[bool, typer.Option(help="Move the name to the new version.")] = True,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Publish an adapter directory as a new version of NAME."""
    with one_sentence(), _client(url) as client:
        pushed = client.push(name, directory, label=label, activate=activate)
        if json_output:
            return _print_json(pushed)
        done = "unchanged" if pushed.unchanged else "live" if pushed.live else "staged"
        typer.echo(f"{pushed.name}@{pushed.version} {done}: {pushed.digest}")


@weights_app.command("list")
def list_weights(
    name: Annotated[str | None, typer.Argument(help="One policy; without it all of them.")] = None,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """List the policies, their versions and which one is live."""
    with one_sentence(), _client(url) as client:
        lines = [client.policy(name)] if name else list(client.weights())
        if json_output:
            return _print_json({"policies": lines})
        _print_policies(lines)


@weights_app.command("activate")
def activate_weights(
    name: Annotated[str, typer.Argument(help="The policy.")],
    version: Annotated[int, typer.Argument(min=1, help="The number of a kept version.")],
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Move NAME to a version that is kept: promote, or roll back."""
    with one_sentence(), _client(url) as client:
        moved = client.activate(name, version)
        if json_output:
            return _print_json(moved)
        typer.echo(f"{name}@{version} is live")


@weights_app.command("delete")
def delete_weights(
    name: Annotated[str, typer.Argument(help="The policy.")],
    version: Annotated[int | None, typer.Argument(min=1, help="One version; it must not be live.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The name and all its versions.")] = False,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Delete one version of NAME, or with --all the whole name. Rows that still use them run on."""
    with one_sentence(), _client(url) as client:
        if everything == (version is not None):
            raise ValueError("name one version to delete, or say --all for the whole name")
        gone = client.delete_policy(name) if version is None else client.delete(name, version)
        if json_output:
            return _print_json(gone)
        typer.echo(f"deleted {', '.join(f'{name}@{number}' for number in gone.versions)}")


@weights_app.command("export")
def export_weights(
    name: Annotated[str, typer.Argument(help="The policy.")],
    version: Annotated[int, typer.Argument(min=1, help="The number of a kept version.")],
    directory: Annotated[Path, typer.Argument(help="Where the two files go; it is made.", file_okay=False)],
    format: Annotated[
        Literal["peft", "mlx"] | None, typer.Option(help="Whose files to write; for dense versions leave it out.")
    ] = None,
    url: Url = None,
    json_output: Json = False,
) -> None:
    """Write a version as the adapter directory that PEFT or mlx-lm loads."""
    with one_sentence(), _client(url) as client:
        exported = client.export(name, version, format=format)
        exported.save(directory)
        if json_output:
            done = {"name": name, "version": version, "digest": exported.digest, "format": exported.format}
            return _print_json(done | {"directory": str(directory), "bytes": len(exported.body)})
        typer.echo(f"{directory} holds {name}@{version}: {exported.digest}")


# ---- doctor -------------------------------------------------------------------------------------------------------


@app.command()
def doctor(json_output: Json = False) -> None:
    """Look at this machine: device, BLAS, measured GFLOP/s, memory and self-tests. Exit status 1 if one fails."""
    with one_sentence():
        from rollout_server.doctor import examine, print_report

        report = examine()
        if json_output:
            _print_json(report.as_json())
        else:
            print_report(report)
        raise typer.Exit(0 if report.ok else 1)


# ---- what the commands share --------------------------------------------------------------------------------------


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what a user can cause into one sentence on standard error and exit status 1. A bug keeps its traceback."""
    try:
        yield
    except typer.Exit:  # a RuntimeError by descent
        raise
    except RolloutError as error:
        _fail(error.message)
    except ImportError as error:
        _fail(f"{error}. `rollout-server doctor` says what is wrong with this installation.")
    except (OSError, RuntimeError, ValueError) as error:
        log.debug("Where it came from:", exc_info=True)
        _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    typer.echo(f"rollout-server: {message}", err=True)
    raise typer.Exit(1)


def _load_blas() -> BlasChoice:
    from rollout_server.blas import load_fast_blas

    return load_fast_blas()


def configure(given: dict[str, Any]) -> ServerConfig:
    """The configuration from options and environment. Raises ValueError with one line that names every bad option."""
    from rollout_server.config import ServerConfig

    return _read(ServerConfig, given)


def _read(settings: type[S], given: dict[str, Any]) -> S:
    from pydantic import ValidationError

    try:
        return settings(**given)
    except ValidationError as error:
        faults = [_fault(fault["loc"], fault["msg"]) for fault in error.errors()]
        raise ValueError("; ".join(faults)) from None


def _fault(loc: tuple[int | str, ...], message: str) -> str:
    text = message.removeprefix("Value error, ")
    if not loc:
        return text
    field = str(loc[0])
    flag = "adapter" if field == "adapters" else field.replace("_", "-")
    return f"--{flag} (ROLLOUT_{field.upper()}): {text}"


@contextmanager
def _client(url: str | None) -> Iterator[RolloutClient]:
    """A client with this environment's key; what the server refuses leaves as one sentence."""
    from rollout_server.config import ClientSettings
    from trainer_client import Retry, RolloutClient, TrainerClientError

    # With --url it does not matter what the variables say of an address.
    settings = _read(ClientSettings, {} if url is None else {"host": "127.0.0.1", "port": 8000})
    try:
        with RolloutClient(url or settings.url, api_key=settings.key, retry=Retry(attempts=3)) as client:
            yield client
    except TrainerClientError as error:
        raise RuntimeError(str(error)) from error


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        # The contract's name for a size is `bytes`.
        names = {field.name: "bytes" if field.name == "nbytes" else field.name for field in fields(value)}
        return {name: getattr(value, attribute) for attribute, name in names.items()}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


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
