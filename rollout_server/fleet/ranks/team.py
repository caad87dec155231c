"""The other ranks as rank 0 knows them: told of commands, listened to, and ended with it.

Each is at the other end of two connections: one for decisions, which the engine's thread writes and the other engine's
thread reads, and one for commands, which may be long, and for signs of life.
"""

from __future__ import annotations

import logging
import queue
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rollout_server.engine.messages.options import RankOptions
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.codec.frames import BadFrame, Codec
from rollout_server.fleet.ranks.decisions import DECISION, OTHER, Teller
from rollout_server.fleet.ranks.environment import file_of, of_rank

log = logging.getLogger("rollout_server.fleet")

START_S = 120.0
"""A process may take so long to be ready to meet the others."""
ALIVE, FAILED = b"alive", b"failed "
"""Lines that a rank says beside decisions: that it runs, and what went wrong."""
ALIVE_EVERY_S = 1.0
LONG_TURN = 10
"""A turn may take so many times as long as a rank may be silent."""
WATCH_S, STATUS_S = 0.2, 1.0
GOES_NOT_ON = "An engine of several ranks does not go on without one of them, or with one that is out of step."


@dataclass(slots=True, eq=False)
class Member:
    """Another rank."""

    rank: int
    decisions: socket.socket
    commands: socket.socket
    process: subprocess.Popen[bytes] | None = None
    heard_at: float = field(default_factory=time.monotonic)
    said: bytes = b""
    """The beginning of a line, or of an answer."""
    answered: bytes = b""
    turns: int = 0
    """Those that it did as rank 0 did."""

    def ended(self) -> str:
        """How its process ended, as far as that is known here: a moment after its connections close."""
        try:
            status = None if self.process is None else self.process.wait(STATUS_S)
        except subprocess.TimeoutExpired:
            status = None
        return "" if status is None else f" (exit status {status})"


class Team:
    """Every rank is given the `messages`, in their order. `fell` is called once, with a sentence, when the engine
    cannot go on: from any thread."""

    def __init__(
        self,
        members: Sequence[Member],
        codec: Codec,
        messages: queue.SimpleQueue[Any],
        ranks: RankOptions,
        fell: Callable[[str], None],
    ) -> None:
        self.members = members
        self._codec = codec
        self._messages = messages
        self._silent_s, self._load_s = ranks.silent_s, ranks.load_s
        self._began = time.monotonic()
        self._fell = fell
        self._teller: Teller | None = None
        self._over = threading.Event()
        self.fault: str | None = None
        """Why the engine cannot go on."""

    @property
    def decisions(self) -> list[socket.socket]:
        return [member.decisions for member in self.members]

    def start(self) -> None:
        """Begins to send and to watch."""
        for work in (self._write, self._watch):
            threading.Thread(target=work, name="ranks", daemon=True).start()

    def lead(self, teller: Teller) -> None:
        """Turns begin: none may take too long."""
        self._teller = teller

    def close(self) -> None:
        """The engine has ended as it was told: whoever ends now ends with it."""
        self._over.set()

    def end(self, reason: str) -> None:
        """The engine cannot go on: what runs on this machine is killed, and who runs elsewhere finds the line cut."""
        if self.fault is not None or self._over.is_set():
            return
        self.fault = reason
        self._over.set()
        log.critical("%s", reason)
        for member in self.members:
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
            for link in (member.decisions, member.commands):
                _cut(link)
        self._fell(reason)

    def _write(self) -> None:
        while not self._over.is_set():
            try:
                parts = self._codec.parts(self._messages.get(timeout=ALIVE_EVERY_S))
            except queue.Empty:
                continue
            except BadFrame as error:
                return self.end(f"The other ranks could not be told a command: {error} {GOES_NOT_ON}")
            for member, part in product(self.members, parts):
                try:
                    member.commands.sendall(part)
                except OSError:
                    return  # Whoever watches says why.

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for member in self.members:
                selector.register(member.decisions, selectors.EVENT_READ, (member, self._answered))
                selector.register(member.commands, selectors.EVENT_READ, (member, self._said))
            while not self._over.is_set():
                for key, _ in selector.select(WATCH_S):
                    member, read = key.data
                    if not self._over.is_set() and (reason := self._read(member, key.fileobj, read)) is not None:
                        self.end(reason)
                if not self._over.is_set() and (reason := self._late()) is not None:
                    self.end(reason)

    def _read(self, member: Member, link: Any, read: Callable[[Member, bytes], str | None]) -> str | None:
        try:
            data = link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return f"Rank {member.rank} has ended{member.ended()}. {GOES_NOT_ON}"
        return read(member, data)

    def _said(self, member: Member, data: bytes) -> str | None:
        member.heard_at = time.monotonic()
        *lines, member.said = (member.said + data).split(b"\n")
        for line in lines:
            if line.startswith(FAILED):
                return f"Rank {member.rank}: {line.removeprefix(FAILED).decode(errors='replace')} {GOES_NOT_ON}"
        return None

    def _answered(self, member: Member, data: bytes) -> str | None:
        """Answers come from the thread that computes, which a process that only looks alive does not give."""
        data = member.answered + data
        whole = len(data) - len(data) % DECISION.size
        member.answered = data[whole:]
        for kind, _ in DECISION.iter_unpack(data[:whole]):
            if kind == OTHER:
                return (
                    f"Before turn {member.turns + 1} rank {member.rank} did something else than rank 0. {GOES_NOT_ON}"
                )
            member.turns += 1
        return None

    def _late(self) -> str | None:
        now = time.monotonic()
        for member in self.members:
            if now - member.heard_at > self._silent_s:
                return f"Rank {member.rank} was not heard of for {self._silent_s:g} s. {GOES_NOT_ON}"
        if self._teller is None and now - self._began > self._load_s:
            return (
                f"{len(self.members) + 1} ranks have not loaded the model and tried it together within "
                f"{self._load_s:g} s. {GOES_NOT_ON}"
            )
        told_at = self._teller.told_at if self._teller is not None else None
        if told_at is not None and now - told_at > LONG_TURN * self._silent_s:
            return f"No rank has got any further for {LONG_TURN * self._silent_s:g} s. {GOES_NOT_ON}"
        return None


def _cut(link: socket.socket) -> None:
    try:
        link.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def start_here(ranks: RankOptions, hosts: str, begin: bytes) -> list[Member]:
    """Starts the other ranks on this machine, and returns when each is ready to meet and knows which engine it is a
    rank of. Raises `EngineUnavailable`."""
    members: list[Member] = []
    for rank in range(1, ranks.size):
        own, others = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        setting = ["env", *(f"{name}={value}" for name, value in of_rank(rank, ranks).items())]
        ends = [end.fileno() for end in others]
        command = [*setting, sys.executable, "-m", "rollout_server.fleet.ranks.follower", *map(str, ends)]
        with others[0], others[1], file_of(hosts) as addresses:
            process = subprocess.Popen(command, pass_fds=ends, stdin=addresses)
        members.append(Member(rank, own[0], own[1], process))
    with ending(members):
        for member in members:
            _await_alive(member)
            member.commands.sendall(begin)
    return members


@contextmanager
def ending(members: Sequence[Member]) -> Iterator[None]:
    """Whatever fails within kills these ranks: nobody else knows of them yet, and they would wait for rank 0."""
    with ExitStack() as unless_all_is_well:
        for member in members:
            unless_all_is_well.callback(_discard, member)
        yield
        unless_all_is_well.pop_all()


def _discard(member: Member) -> None:
    if member.process is not None and member.process.poll() is None:
        member.process.kill()
        member.process.wait()
    member.decisions.close()
    member.commands.close()


def _await_alive(member: Member) -> None:
    member.commands.settimeout(START_S)
    try:
        alive = member.commands.recv(len(ALIVE) + 1, socket.MSG_WAITALL) == ALIVE + b"\n"
    except TimeoutError:
        alive = False
    member.commands.settimeout(None)
    if not alive:
        raise EngineUnavailable(f"Rank {member.rank} did not start{member.ended()}; its log says why.")
