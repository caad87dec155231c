"""An end of a link: frames over a stream, and what is at its other end."""

from __future__ import annotations

import asyncio
import subprocess
from collections import deque
from contextlib import suppress
from typing import Any

from rollout_server.fleet.codec.frames import LENGTHS, PIECE, BadFrame, Codec, Frame, pieces, room

BUFFER = 1 << 20
"""Bytes that are read ahead; frames may be longer."""
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
        parts = self._codec.parts(message)
        if self._pump is None and sum(map(len, parts)) <= PIECE:
            self._writer.write(b"".join(parts))
            return
        # A version that goes to many replicas is in memory once: each link writes a piece when the last one has left.
        self._waiting.extend(pieces(parts))
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        with suppress(OSError):
            while self._waiting and not self._writer.is_closing():
                self._writer.write(self._waiting.popleft())
                await self._writer.drain()
                # Where the system takes whatever it is given, that has not waited: everybody else has a turn.
                await asyncio.sleep(0)
        self._waiting.clear()
        self._pump = None

    async def receive(self) -> Any:
        """The next message; None once the link is closed. Raises `BadFrame`."""
        try:
            return self._codec.decode(*await self._frame(None))
        except (asyncio.IncompleteReadError, OSError):
            return None

    async def greeting(self, longest: int, codec: Codec) -> Any:
        """The first message of somebody who is not known yet, as `codec` reads it. Raises `BadFrame`, also where it is
        longer than `longest` bytes, and `IncompleteReadError`."""
        return codec.decode(*await self._frame(longest))

    async def _frame(self, longest: int | None) -> Frame:
        head, arrays = LENGTHS.unpack(await self._reader.readexactly(LENGTHS.size))
        if longest is not None and head + arrays > longest:
            raise BadFrame(f"A frame of {head + arrays} bytes is too long for a first word.")
        return await self._reader.readexactly(head), await self._arrays(arrays)

    async def _arrays(self, nbytes: int) -> memoryview:
        """Read where they stay, a piece in each turn of the loop."""
        found, at = room(nbytes), 0
        while at < nbytes:
            piece = await self._reader.read(min(PIECE, nbytes - at))
            if not piece:
                raise asyncio.IncompleteReadError(b"", nbytes - at)
            found[at : at + len(piece)] = piece
            at += len(piece)
            await asyncio.sleep(0)
        return found

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
