"""Why a server cannot have its address, and what to do: who listens there already, or what else is wrong with it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rollout_server.quoting import shortened

PROC = Path("/proc")
LISTENS = "0A"
"""State of a listening socket in Linux's tables."""
COMMAND_SHOWN = 80
PRIVILEGED = 1024
"""Ports below are root's on most systems."""


def unusable(host: str, port: int, error: OSError) -> str:
    """The sentences for a socket that could not be bound."""
    return f"The address {host}:{port} cannot be used: {_cause(port, error)}"


def _cause(port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = holder_of(port)
        who = f"another program listens there (`lsof -nP -iTCP:{port}` names it)" if holder is None else holder
        return f"{who}. Stop it, or choose another port with --port; 0 takes a free one."
    if error.errno == errno.EACCES and port < PRIVILEGED:
        return f"ports below {PRIVILEGED} are root's here. Choose another one with --port."
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return "this machine has no such address. Give --host one that it has: 127.0.0.1, or 0.0.0.0 for all of them."
    return f"{error}."


def holder_of(port: int, proc: Path = PROC) -> str | None:
    """`process 4711 (python -m rollout_server serve) listens there`, of whichever address. None where nobody is seen:
    without Linux's /proc, or if the process is another user's."""
    wanted = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    for link in proc.glob("[0-9]*/fd/*") if wanted else ():
        with suppress(OSError):  # another user's, or gone
            if str(link.readlink()) in wanted:
                process = link.parts[-3]
                return f"process {process} ({_command(proc / process)}) listens there"
    return None


def _listening(port: int, proc: Path) -> Iterator[str]:
    """The inodes of sockets that listen at the port."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == LISTENS:
                    yield fields[9]


def _command(process: Path) -> str:
    words = (process / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return shortened(" ".join(word.decode(errors="replace") for word in words), COMMAND_SHOWN)
