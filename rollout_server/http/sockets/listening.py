"""The socket that accepts connections, and what it does when there are too many of them or no file is left for one."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from contextlib import suppress
from typing import Any

from rollout_server.http.sockets.connection import raw_reply, too_many
from rollout_server.open_files import OpenFiles

log = logging.getLogger("rollout_server.http")

EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
QUIET_S = 60.0
"""Seconds between two lines of the log about too many connections."""
READ_AT_ONCE = 65_536


class Listener(socket.socket):
    """Whoever is beyond what may be open is answered 503 here and now, so that there is always a file left for it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._spare: int | None = None
        self._refused = 0
        self._told = -QUIET_S
        self._gave_up = False

    def __enter__(self) -> Listener:
        self._spare = _any_file()
        return self

    def close(self) -> None:
        self._give_spare()
        super().close()

    def accept(self) -> tuple[socket.socket, Any]:
        """As asyncio calls it, again and again until it raises. Raises `BlockingIOError` where nobody waits, and any
        other `OSError` once a second at the most: asyncio goes on calling after those it waits for."""
        while True:
            try:
                connection, address = super().accept()
            except OSError as error:
                if error.errno not in EXHAUSTED:
                    raise
                connection = self._accept_with_spare(error)
                self._refuse(connection)
                continue
            last = OpenFiles.now().last
            if last is None or connection.fileno() <= last:
                return connection, address
            self._refuse(connection)

    def _accept_with_spare(self, error: OSError) -> socket.socket:
        """One more connection in the place of the file that is kept for it."""
        if not self._give_spare():
            self._tell()
            # asyncio lets the socket rest after the first, and calls on all the same.
            self._gave_up = not self._gave_up
            if self._gave_up:
                raise error
            raise BlockingIOError
        return super().accept()[0]

    def _give_spare(self) -> bool:
        given, self._spare = self._spare, None
        if given is not None:
            os.close(given)
        return given is not None

    def _refuse(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.setblocking(False)
            connection.send(raw_reply(too_many()))
            connection.shutdown(socket.SHUT_WR)
            # Closed with something unread, it would be reset before the client has read the reply.
            connection.recv(READ_AT_ONCE)
        self._spare = _any_file() if self._spare is None else self._spare
        self._refused += 1
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= QUIET_S:
            log.warning(
                "Too many connections: %s. Those beyond are answered 503, %d since this was said last. Use fewer, or "
                "raise the limit (ulimit -n).",
                OpenFiles.now(),
                self._refused,
            )
            self._told, self._refused = now, 0


def _any_file() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's exception handler: what `Listener` has told of is not told again."""
    fault = context.get("exception")
    if not ("socket" in context and isinstance(fault, OSError) and fault.errno in EXHAUSTED):
        loop.default_exception_handler(context)
