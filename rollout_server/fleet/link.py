"""An end of a link: frames over a stream, and what is at its other end."""

from __future__ import annotations

import asyncio
import subprocess
from collections import deque
from contextlib import suppress
from typing import Any

from rollout_server.fleet.codec.frames import LENGTH, BadFrame, Codec

BUFFER = 1 << 20
"""Bytes that are read ahead; frames may be longer."""
PIECE = 1 << 18
"""Bytes that are written at once."""
FLUSH_S = 1.0
"""Seconds that the last words to the other end may take."""


class Link:
    """Belongs to the event loop. `process` is the replica's where this machine runs it; without one, killing it cuts
    the link, and whoever is at its other end finds that out."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        codec: Codec,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.process = process
        self._codec = codec
        self._reader = reader
        self._writer = writer
        self._waiting: deque[memoryview] = deque()
        """Pieces of long frames and what was sent behind them."""
        self._pump: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None else None

    def send(self, message: Any) -> None:
        """Messages arrive in their order, or the link closes; what is sent to a closed one is forgotten."""
        if self._writer.is_closing():
            return
        frame = self._codec.encode(message)
        if self._pump is None and len(frame) <= PIECE:
            self._writer.write(frame)
            return
        # A frame that goes to many replicas is in memory once: each link writes a piece when the last one has left.
        self._waiting.extend(memoryview(frame)[at : at + PIECE] for at in range(0, len(frame), PIECE))
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        with suppress(OSError):
            while self._waiting and not self._writer.is_closing():
                self._writer.write(self._waiting.popleft())
                await self._writer.drain()
        self._waiting.clear()
        self._pump = None

    async def receive(self) -> Any:
        """The next message; None once the link is closed. Raises `BadFrame`."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return self._codec.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def greeting(self, longest: int, codec: Codec) -> Any:
        """The first message of somebody who is not known yet, as `codec` reads it. Raises `BadFrame`, also where it is
        longer than `longest` bytes, and `IncompleteReadError`."""
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if length > longest:
            raise BadFrame(f"A frame of {length} bytes is too long for a first word.")
        return codec.decode(await self._reader.readexactly(length))

    def kill(self) -> None:
        """Ends the process at once, which may hang; where there is none it closes the link, if need be unflushed."""
        if self.process is None:
            self._writer.close()
            asyncio.get_running_loop().call_later(FLUSH_S, self._writer.transport.abort)
        elif self.process.poll() is None:
            self.process.kill()

    async def ended(self, within_s: float) -> None:
        """Waits for the process and ends it if it does not; closes the link."""
        if self.process is not None:
            try:
                await asyncio.to_thread(self.process.wait, within_s)
            except subprocess.TimeoutExpired:
                self.kill()
                await asyncio.to_thread(self.process.wait)
            self._writer.close()
        else:
            self.kill()
