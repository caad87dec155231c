"""The controller's end of a link to one replica, and the process behind it."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from rollout_server.fleet.codec.frames import LENGTH, Codec

log = logging.getLogger("rollout_server.fleet")

BUFFER = 1 << 20
"""Bytes that are read ahead; frames may be longer."""


class Link:
    """One per replica that runs. Belongs to the event loop."""

    def __init__(self, process: subprocess.Popen[bytes], own: socket.socket, codec: Codec) -> None:
        self.process = process
        self._own = own
        self._codec = codec
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=self._own, limit=BUFFER)

    def send(self, message: Any) -> None:
        """Messages arrive in their order, or the link closes; what is sent to a closed one is forgotten."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(self._codec.encode(message))

    async def receive(self) -> Any:
        """The next message; None once the link is closed. Raises `BadFrame`."""
        if self._reader is None:
            return None
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return self._codec.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def kill(self) -> None:
        """Ends the process at once: it may hang."""
        if self.process.poll() is None:
            self.process.kill()

    async def ended(self, within_s: float) -> None:
        """Waits for the process and ends it if it does not; closes the link."""
        try:
            await asyncio.to_thread(self.process.wait, within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            await asyncio.to_thread(self.process.wait)
        if self._writer is not None:
            self._writer.close()


def start_child(codec: Codec, variables: Mapping[str, str]) -> Link:
    """A replica in a process of its own, joined by a pair of sockets: there is no port and nothing to find it by. Its
    environment is this one, with `variables`."""
    own, other = socket.socketpair()
    with other:
        setting = ["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []
        command = [*setting, sys.executable, "-m", "rollout_server.fleet.replica", str(other.fileno())]
        process = subprocess.Popen(command, pass_fds=(other.fileno(),), stdin=subprocess.DEVNULL)
    own.setblocking(False)
    return Link(process, own, codec)
