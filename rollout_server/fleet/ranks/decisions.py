"""What an engine decides by and ranks cannot know alike: what is in the mailbox, and what time it is.

Every rank runs the same loop over the same commands, so that nothing else needs to be told. Rank 0 tells each answer of
its mailbox and each reading of its clock, in their order; the others read them where rank 0 asked. Where a turn's
commands end, digests of what was done since the last end are compared.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rollout_server.engine.messages.rollouts import Command
from rollout_server.engine.messages.versions import Publish, Restore
from rollout_server.engine.ranks.digest import TurnDigest

TAKE, NONE, CLOCK, EMPTY = b"T", b"N", b"C", b"E"
"""A command was taken; there is none left; the clock says; the mailbox is empty or not."""
SAME, OTHER = b"S", b"O"
"""What a rank says of a turn's digest."""
DECISION = struct.Struct("<c8s")
SECONDS = struct.Struct("<d")


class OutOfStep(Exception):
    """Ranks that should do the same do something else."""


class Teller:
    """Rank 0's side; `links` lead to the others. Engine thread only, but for what is read of it."""

    def __init__(self, links: Sequence[socket.socket], digest: TurnDigest) -> None:
        self._links = links
        self._digest = digest
        self.turns = 0
        """Whose commands have been taken."""
        self.told_at: float | None = None
        """When anything was told last, by time.monotonic(); None before the first turn."""

    def tell(self, kind: bytes, value: bytes = b"") -> None:
        """Raises `OSError` once a rank is gone."""
        self.told_at = time.monotonic()
        frame = DECISION.pack(kind, value)
        for link in self._links:
            link.sendall(frame)

    def none_left(self) -> None:
        self.turns += 1
        self.tell(NONE, self._digest.take())

    def clock(self) -> float:
        """Seconds by this rank's clock, which is that of all."""
        now = time.monotonic()
        self.tell(CLOCK, SECONDS.pack(now))
        return now


class LeadMailbox(queue.SimpleQueue[Command]):
    """Rank 0's mailbox: the others get each command when it is put, and are told when it is taken. `send` is given
    commands in the order in which they are put."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        super().__init__()
        self._send = send
        self._order = threading.Lock()
        self._teller: Teller | None = None

    def begin(self, teller: Teller) -> None:
        """Before the engine asks for anything."""
        self._teller = teller

    def put(self, item: Command, block: bool = True, timeout: float | None = None) -> None:
        with self._order:
            super().put(item)
            self._send(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Command:
        try:
            command = super().get(block, timeout)
        except queue.Empty:
            if self._teller is not None:
                self._teller.none_left()
            raise
        if self._teller is not None:
            self._teller.tell(TAKE)
        return command

    def get_nowait(self) -> Command:
        return self.get(block=False)

    def empty(self) -> bool:
        found = super().empty()
        if self._teller is not None:
            self._teller.tell(EMPTY, bytes([found]))
        return found


class Listener:
    """What another rank hears of rank 0. Engine thread only."""

    def __init__(self, link: socket.socket, digest: TurnDigest) -> None:
        self._link = link
        self._digest = digest
        self.turns = 0

    def hear(self, *kinds: bytes) -> tuple[bytes, bytes]:
        """The next decision, of one of these kinds. Raises `OutOfStep` for another, `EOFError` where rank 0 is gone."""
        frame = self._link.recv(DECISION.size, socket.MSG_WAITALL)
        if len(frame) < DECISION.size:
            raise EOFError("Rank 0 is gone.")
        kind, value = DECISION.unpack(frame)
        if kind not in kinds:
            raise OutOfStep(
                f"In turn {self.turns} rank 0 told {kind.decode()!r}, and this rank asks for {b' or '.join(kinds)!r}."
            )
        return kind, value

    def end_of_commands(self, digest: bytes) -> None:
        """Says whether this rank did in the last turn what rank 0 did. Raises `OutOfStep` where it did not."""
        self.turns += 1
        own = self._digest.take()
        self._link.sendall(DECISION.pack(SAME if own == digest else OTHER, own))
        if own != digest:
            raise OutOfStep(f"Before turn {self.turns} this rank did something else than rank 0.")

    def clock(self) -> float:
        """Seconds by rank 0's clock."""
        seconds: float = SECONDS.unpack(self.hear(CLOCK)[1])[0]
        return seconds


class FollowMailbox(queue.SimpleQueue[Command]):
    """Another rank's mailbox: commands are put as they come, and taken when rank 0 takes them."""

    def __init__(self) -> None:
        super().__init__()
        self._listener: Listener | None = None

    def begin(self, listener: Listener) -> None:
        """Before the engine asks for anything."""
        self._listener = listener

    def get(self, block: bool = True, timeout: float | None = None) -> Command:
        kind, digest = self._heard(TAKE, NONE)
        if kind == TAKE:
            return super().get()
        self._led.end_of_commands(digest)
        raise queue.Empty

    def get_nowait(self) -> Command:
        return self.get()

    def empty(self) -> bool:
        return bool(self._heard(EMPTY)[1][0])

    def _heard(self, *kinds: bytes) -> tuple[bytes, bytes]:
        return self._led.hear(*kinds)

    @property
    def _led(self) -> Listener:
        if self._listener is None:
            raise RuntimeError("A rank asked its mailbox before it was led.")
        return self._listener


def travelling(command: Command) -> Any:
    """A command as it goes to other ranks: what was prepared of a version is prepared there again."""
    match command:
        case Publish():
            return replace(command, prepared=None)
        case Restore():
            return replace(command, versions=tuple(replace(version, prepared=None) for version in command.versions))
    return command
