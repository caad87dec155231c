"""What Ray runs on a node: a replica's engine in the actor's own process, and its link as calls of the actor.

Arguments and results are `bytes`, which Ray carries as they are, and whole numbers. It pickles none of our objects: of
this class it pickles a subclass that names it, so every node needs this package.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from contextlib import suppress

MOST_BYTES = 1 << 22
"""Bytes that one call gives back, and that are handed to the replica at once."""


class ReplicaActor:
    """Serves one controller at a time, by the number of its connection. An engine knows what it was told before, so a
    connection that comes after one that was used ends the process, and Ray starts a fresh one.

    Calls may overtake each other: whoever sends waits for one before the next."""

    def __init__(self) -> None:
        self._connection = 0
        self._begun = asyncio.Event()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, connection: int) -> None:
        """What comes from other connections is passed over from now on."""
        if self._begun.is_set():
            os._exit(1)
        self._connection = connection

    async def send(self, connection: int, frames: bytes) -> None:
        """Gives the replica bytes; the first have it start its engine."""
        if connection != self._connection:
            return
        self._begun.set()
        if self._writer is None:
            own, other = socket.socketpair()
            threading.Thread(target=serve, args=(other,), name="replica", daemon=True).start()
            self._reader, self._writer = await asyncio.open_connection(sock=own)
        # Whoever reads is told by the end of what there is to read.
        with suppress(ConnectionError):
            for at in range(0, len(frames), MOST_BYTES):
                self._writer.write(memoryview(frames)[at : at + MOST_BYTES])
                await self._writer.drain()

    async def receive(self, connection: int) -> bytes:
        """What the replica said since, as soon as it says something; nothing once its link is closed."""
        while connection == self._connection:
            if self._reader is not None:
                return await self._reader.read(MOST_BYTES)
            await asyncio.sleep(0.01)
        return b""


def serve(link: socket.socket) -> None:
    """Runs a replica until its link closes. An engine that dies before that ends the process."""
    from rollout_server import logs
    from rollout_server.machine.blas import load_fast_blas, one_thread_for_numpy

    logs.configure("text")
    # Before anything imports mlx.
    load_fast_blas()
    one_thread_for_numpy()
    from rollout_server.fleet.replica.__main__ import StartedReplica

    with link:
        StartedReplica(link).run()
