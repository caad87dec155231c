"""A rank that is not rank 0: the same engine, which does what it is told and tells nobody.

    python -m rollout_server.fleet.ranks.follower DECISIONS COMMANDS

The two are open sockets that it was started with. It ends when rank 0 does.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from adapters.errors import AdapterError
from adapters.prepare import prepare
from rollout_server import logs
from rollout_server.engine.messages.options import EngineOptions, RankOptions
from rollout_server.engine.messages.rollouts import Event
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Publish
from rollout_server.engine.thread import EngineThread
from rollout_server.errors import EngineUnavailable, RolloutError
from rollout_server.fleet.codec.frames import BadFrame, Frame, next_frame
from rollout_server.fleet.ranks.decisions import FollowMailbox, Listener
from rollout_server.fleet.ranks.team import ALIVE, ALIVE_EVERY_S, FAILED
from rollout_server.fleet.ranks.words import Begin, rank_codec
from rollout_server.grammar import Constraint, Grammar
from rollout_server.machine.blas import load_fast_blas, one_thread_for_numpy, share_cores

log = logging.getLogger("rollout_server.fleet")


class FollowEngine(EngineThread):
    """`ranks` is the group that this process is one of; `said` takes what went wrong."""

    def __init__(self, options: EngineOptions, ranks: Any, decisions: socket.socket) -> None:
        super().__init__(options, self._see_events, self._see_status)
        self._mailbox = self._commands = FollowMailbox()
        self._ranks = ranks
        self._listener = Listener(decisions, ranks.digest)
        self._clock = self._listener.clock
        self._device_fault = self._why
        self.settled = threading.Event()
        """The model is there, or nothing will be."""
        self.fault: str | None = None

    def _gather(self) -> Any:
        return self._ranks

    def _begin(self) -> None:
        self._commands.begin(self._listener)
        self.settled.set()

    def _why(self) -> str:
        return f"a step failed on rank {self._ranks.rank} of {self._ranks.size}"

    def _see_events(self, events: list[Event]) -> None:
        self._ranks.digest.saw_events(events)

    def _see_status(self, status: EngineStatus) -> None:
        if status.state == "ready":
            self._ranks.digest.saw_status(status)
        elif status.state == "dead":
            self.fault = status.fault or "it ended"
            self.settled.set()


class Follower:
    """Belongs to the main thread. One thread reads, one makes commands ready, and one says that this rank runs."""

    def __init__(self, decisions: socket.socket, commands: socket.socket) -> None:
        self._decisions = decisions
        self._commands = commands
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._codec = rank_codec(self._compile)
        self._engine: FollowEngine | None = None

    def run(self, joined: Any = None) -> int:
        """Serves until rank 0 ends; returns the exit status. `joined` is the group where there is one already."""
        begin = self._codec.decode(*(self._frame() or (b"", b"")))
        if not isinstance(begin, Begin) or begin.options.ranks is None:
            return 2
        ranks = begin.options.ranks
        if joined is None:
            share_cores(begin.options.sharing)
            from rollout_server.fleet.ranks.group import join

            joined = join(ranks)
        self._engine = engine = FollowEngine(begin.options, joined, self._decisions)
        for work in (self._read, self._apply, self._say_alive):
            threading.Thread(target=work, name="rank", daemon=True).start()
        engine.start()
        engine.join()
        if engine.fault is not None:
            self._say(FAILED + " ".join(engine.fault.split()).encode())
        return 1 if engine.fault is not None else 0

    def _frame(self) -> Frame | None:
        """The next frame; None once the connection is closed."""
        try:
            return next_frame(self._commands.recv_into)
        except OSError:
            return None

    def _read(self) -> None:
        """The engine's thread may wait in a sum that nobody joins any more: this ends it too."""
        while (frame := self._frame()) is not None:
            self._frames.put(frame)
        if self._engine is not None and self._engine.is_alive():
            self._engine.join(ALIVE_EVERY_S)
        os._exit(1)

    def _apply(self) -> None:
        engine = self._engine
        if engine is None:
            return
        engine.settled.wait()
        while engine.fault is None:
            try:
                command = self._codec.decode(*self._frames.get())
            except (BadFrame, RolloutError) as error:
                # Rank 0 took it: this one cannot do the same.
                self._say(FAILED + f"it was told what it does not understand: {error}".encode())
                os._exit(1)
            engine.put(self._ready(command, engine))

    @staticmethod
    def _ready(command: Any, engine: FollowEngine) -> Any:
        """A version is prepared beside the engine, as it was for rank 0; what cannot be is left to the engine."""
        if not isinstance(command, Publish) or engine.info is None:
            return command
        try:
            return replace(command, prepared=prepare(command.bundle, engine.info.dtype, mode=command.mode))
        except (AdapterError, ValueError, KeyError):
            return command

    def _say_alive(self) -> None:
        while self._say(ALIVE):
            time.sleep(ALIVE_EVERY_S)

    def _say(self, line: bytes) -> bool:
        try:
            self._commands.sendall(line + b"\n")
        except OSError:
            return False
        return True

    def _compile(self, grammar: Grammar) -> Constraint:
        if self._engine is None or self._engine.grammars is None:
            raise EngineUnavailable("This model writes no text that a grammar could bind.")
        return self._engine.grammars.compile(grammar, "grammar")


def say_little() -> None:
    """Rank 0 says what all of them would say."""
    logging.getLogger("rollout_server").setLevel(logging.WARNING)


def follow(ranks: RankOptions) -> int:
    """Serves as a rank that was launched with the command of rank 0; returns the exit status."""
    from rollout_server.fleet.ranks.group import join
    from rollout_server.fleet.ranks.meeting import find_lead

    say_little()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    joined = join(ranks)
    decisions, commands = find_lead(joined.group)
    rank_0_ends_it()
    with decisions, commands:
        return Follower(decisions, commands).run(joined)


def rank_0_ends_it() -> None:
    """A terminal's Ctrl-C and a manager's SIGTERM reach the whole group: rank 0 is who ends ranks."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    rank_0_ends_it()
    logs.configure("text")
    say_little()
    load_fast_blas()
    one_thread_for_numpy()
    with socket.socket(fileno=int(sys.argv[1])) as decisions, socket.socket(fileno=int(sys.argv[2])) as commands:
        commands.sendall(ALIVE + b"\n")
        return Follower(decisions, commands).run()


if __name__ == "__main__":
    sys.exit(main())
