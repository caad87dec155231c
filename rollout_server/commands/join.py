"""`rollout-server serve --join`: a replica of another machine's fleet."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

import typer

from rollout_server.config import RankSettings, ServerConfig
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.joining.dial import Controller
from rollout_server.fleet.replica.joiner import Joiner, own_id
from rollout_server.fleet.wire import AGAIN
from rollout_server.machine.blas import one_thread_for_numpy
from rollout_server.versions.startup import engine_options


def join(config: ServerConfig) -> None:
    """Computes for a controller until a signal ends it or the fleet lets it go; where it is to be started anew, its
    process is replaced. Raises `RolloutError` where it is not taken; an engine that fails after that ends it with the
    status `AGAIN`, and so does one of several ranks that is to be started anew: alone it has nobody to meet."""
    one_thread_for_numpy()
    ids: list[str] = []

    def joined(id: str) -> None:
        ids.append(id)
        announce(str(config.join), id)

    try:
        again = asyncio.run(_until_told(config, joined))
    except EngineUnavailable as error:
        if not ids:
            raise
        typer.echo(f"rollout-server: {error.message}", err=True)
        raise typer.Exit(AGAIN) from error
    if again:
        if RankSettings().mlx_rank is not None:
            raise typer.Exit(AGAIN)
        os.execv(sys.executable, [sys.executable, "-m", "rollout_server", *sys.argv[1:]])


async def _until_told(config: ServerConfig, joined: Callable[[str], None]) -> bool:
    joining = asyncio.ensure_future(_join(config, joined))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, joining.cancel)
    try:
        return await joining
    except asyncio.CancelledError:
        return False


def announce(url: str, id: str) -> None:
    """The line that a person waits for."""
    sys.stdout.write(f"rollout-server has joined {url} as {id}\n")
    sys.stdout.flush()


async def _join(config: ServerConfig, joined: Callable[[str], None]) -> bool:
    at = urlsplit(config.join or "")
    encrypted, key = at.scheme == "https", config.fleet_key
    controller = Controller(
        at.hostname or "",
        at.port or (443 if encrypted else 80),
        encrypted,
        key.get_secret_value() if key is not None else None,
        config.fleet_cert,
    )
    controller.context()  # A file that cannot be used is said now, and not at each try.
    options = await asyncio.to_thread(engine_options, config)
    return await Joiner(controller, options, config.replica_timeout_s, joined, own_id()).run()
