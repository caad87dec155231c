"""The server a command talks to: one that runs already, or one of its own for as long as the command lasts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from rollout_server.commands.terminal.command_options import configure, connected, load_blas

if TYPE_CHECKING:
    from trainer_client import RolloutClient

Model = Annotated[
    str | None, typer.Option(help="Start this directory or Hub id for the command.", metavar="DIR_OR_HUB_ID")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub id.")]
OPTIONS: Mapping[str, str] = MappingProxyType({"model": "--model", "revision": "--revision", "adapters": "--adapter"})
"""What commands that may start a server have of its options."""
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="Publish first; repeatable.", metavar="NAME=DIR")]


def one_of(url: str | None, model: str | None, revision: str | None, adapters: list[str] | None) -> None:
    """Raises ValueError for options that exclude each other."""
    if url is not None and model is not None:
        raise ValueError("--url names a server that runs and --model starts one: give one of the two")
    if model is None and (revision is not None or adapters):
        raise ValueError("--revision and --adapter say what --model is to start with, and there is no --model")


@contextmanager
def client_of(
    url: str | None, model: str | None, revision: str | None = None, adapters: list[str] | None = None
) -> Iterator[RolloutClient]:
    """A client of the server at `url`, or of one that is started in this process for `model`, with the limits that the
    environment sets for servers, without its keys and its state."""
    one_of(url, model, revision, adapters)
    if model is None:
        with connected(url) as client:
            yield client
        return
    load_blas()
    own = {"host": "127.0.0.1", "port": 0, "api_key": None, "admin_key": None, "state_dir": None, "adapters": ()}
    given = own | {"model": model, "revision": revision} | ({"adapters": adapters} if adapters else {})
    config = configure(given, OPTIONS)

    from rollout_server import logs
    from rollout_server.http.server import served

    logs.configure(level=logging.WARNING)
    # A download may take long.
    logging.getLogger("rollout_server.hub").setLevel(logging.INFO)
    with served(config) as started, connected(started) as client:
        yield client
