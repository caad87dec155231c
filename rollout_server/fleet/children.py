"""Replicas as processes of this machine: started, and started again when they end."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.fleet.codec.frames import Codec
from rollout_server.fleet.link import BUFFER, Link
from rollout_server.fleet.ranks.environment import placed
from rollout_server.fleet.roster import Roster
from rollout_server.fleet.wire import Hello


class Children:
    """A `Source` of `count` replicas. `devices` name a GPU for each rank of each of them, those of a replica together,
    or are empty: then all share the one device that there is."""

    def __init__(self, count: int, devices: Sequence[str], options: EngineOptions, codec: Codec) -> None:
        each = len(devices) // count
        self._devices = [devices[index * each : (index + 1) * each] for index in range(count)]
        self._sharing = 1 if devices else count
        self._options = replace(options, sharing=self._sharing)
        self._codec = codec
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, roster: Roster) -> None:
        self._tasks = [
            asyncio.create_task(self._keep(roster, f"local-{index}", devices))
            for index, devices in enumerate(self._devices)
        ]

    async def _keep(self, roster: Roster, id: str, devices: Sequence[str]) -> None:
        variables, options = placed(self._options, devices)
        opening = partial(start_child, self._codec, variables)
        await roster.keep(id, opening, Hello(options, self._sharing))

    async def stop(self) -> None:
        await asyncio.gather(*self._tasks)


async def start_child(codec: Codec, variables: Mapping[str, str]) -> Link:
    """A replica in a process of its own, joined by a pair of sockets: there is no port and nothing to find it by. Its
    environment is this one, with `variables`."""
    own, process = _started(variables)
    reader, writer = await asyncio.open_connection(sock=own, limit=BUFFER)
    return Link(reader, writer, codec, process)


def _started(variables: Mapping[str, str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    own, other = socket.socketpair()
    with other:
        setting = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
        command = [*setting, sys.executable, "-m", "rollout_server.fleet.replica", str(other.fileno())]
        process = subprocess.Popen(command, pass_fds=(other.fileno(),), stdin=subprocess.DEVNULL)
    own.setblocking(False)
    return own, process
