"""A replica that was started: it serves its controller over an open socket.

    python -m rollout_server.fleet.replica FILE_DESCRIPTOR

It ends when the link does, and when its engine's thread does.
"""

from __future__ import annotations

import logging
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from rollout_server import logs
from rollout_server.engine.messages.control import Stop
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.codec.frames import BadFrame, next_frame
from rollout_server.fleet.replica.engine import STOP_S, ReplicaEngine
from rollout_server.fleet.wire import CannotStart, Hello, link_codec
from rollout_server.grammar import Constraint, Grammar
from rollout_server.machine.blas import load_fast_blas, one_thread_for_numpy, share_cores

log = logging.getLogger("rollout_server.fleet")

STATUS_S = 0.1
"""The status is told at most so often, seconds, besides what the engine tells of it where something ends."""


class StartedReplica:
    """Belongs to the main thread, which reads; another one writes."""

    def __init__(self, link: socket.socket) -> None:
        self._reader = link.makefile("rb")
        self._link = link
        self._codec = link_codec(self._compile)
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._engine: ReplicaEngine | None = None

    def run(self) -> int:
        """Serves until the link closes; returns the exit status."""
        hello = self._read()
        if not isinstance(hello, Hello):
            return 2
        ranks = hello.options.ranks
        share_cores(hello.cores * (1 if ranks is None or ranks.launched else ranks.size))
        self._engine = engine = ReplicaEngine(hello.options, self._out.put)
        writer = threading.Thread(target=self._write, name="link", daemon=True)
        writer.start()
        first = engine.load()
        self._out.put([first])
        if not isinstance(first, CannotStart):
            while (message := self._read()) is not None and not isinstance(message, Stop):
                engine.apply(message)
            engine.stop()
        self._out.put(None)
        writer.join(STOP_S)
        return int(isinstance(first, CannotStart))

    def _compile(self, grammar: Grammar) -> Constraint:
        if self._engine is None:
            raise EngineUnavailable("The model is still loading.")
        return self._engine.compile(grammar)

    def _read(self) -> Any:
        """The next message; None once the link is closed."""
        try:
            frame = next_frame(self._reader.readinto)
            return None if frame is None else self._codec.decode(*frame)
        except BadFrame as error:
            log.error("The controller said what nobody understands: %s", error)
            return None
        except OSError:
            return None

    def _write(self) -> None:
        told_at, ready = 0.0, False
        told: EngineStatus | None = None
        while True:
            try:
                messages = self._out.get(timeout=STATUS_S)
            except queue.Empty:
                messages = []
            if messages is None:
                self._link.shutdown(socket.SHUT_WR)
                return
            # The first thing that it says is whether it has a model.
            ready = ready or bool(messages)
            status = self._engine.status if self._engine is not None and ready else told
            if status is not None and status is not told and time.monotonic() - told_at >= STATUS_S:
                told, told_at = status, time.monotonic()
                # What is kept of versions is the controller's to tell.
                messages = [*messages, replace(status, policies=())]
            try:
                for message in messages:
                    self._link.sendall(self._codec.encode(message))
            except OSError:
                return


def main() -> int:
    """A terminal's Ctrl-C and a manager's SIGTERM reach the whole group: the controller is who ends replicas."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure("text")
    load_fast_blas()
    one_thread_for_numpy()
    with socket.socket(fileno=int(sys.argv[1])) as link:
        return StartedReplica(link).run()


if __name__ == "__main__":
    sys.exit(main())
