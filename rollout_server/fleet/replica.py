"""A replica: an engine thread and a link to its controller, which is an open socket that it was started with.

    python -m rollout_server.fleet.replica FILE_DESCRIPTOR

It ends when the link does, and when its engine's thread does: an engine that cannot compute must not look alive.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import queue
import signal
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from adapters.errors import AdapterError
from adapters.prepare import prepare
from rollout_server import logs
from rollout_server.adapter_errors import from_adapters
from rollout_server.engine.messages.control import Stop
from rollout_server.engine.messages.rollouts import Event, RequestFailed, Submit
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Delete, Publish
from rollout_server.engine.thread import EngineThread
from rollout_server.errors import EngineEnded, EngineUnavailable
from rollout_server.fleet.codec.frames import LENGTH, BadFrame
from rollout_server.fleet.codec.values import described
from rollout_server.fleet.ranks.lead import LeadEngine
from rollout_server.fleet.wire import (
    VERSIONS,
    CannotStart,
    DropVersion,
    FlipAlias,
    Hello,
    Ready,
    StageVersion,
    link_codec,
)
from rollout_server.grammar import Constraint, Grammar
from rollout_server.machine.blas import load_fast_blas, one_thread_for_numpy, share_cores

log = logging.getLogger("rollout_server.fleet")

STATUS_S = 0.1
"""The status is told at most so often, seconds."""
STOP_S = 60.0
"""An engine that is told to stop has so long to end its step."""
LIBRARIES = ("mlx", "mlx-lm", "rollout-server")


class Replica:
    """Belongs to the main thread, which reads; one thread writes, and one makes versions ready, in their order."""

    def __init__(self, link: socket.socket) -> None:
        self._reader = link.makefile("rb", buffering=1 << 20)
        self._link = link
        self._codec = link_codec(self._compile)
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._status = self._told = EngineStatus("starting")
        self._settled = threading.Event()
        self._staged: dict[tuple[str, int], Publish] = {}
        self._versions = ThreadPoolExecutor(1, "versions")
        self._engine: EngineThread | None = None

    def run(self) -> int:
        """Serves until the link closes; returns the exit status."""
        hello = self._read()
        if not isinstance(hello, Hello):
            return 2
        ranks = hello.options.ranks
        share_cores(hello.cores * (1 if ranks is None or ranks.launched else ranks.size))
        make = EngineThread if ranks is None else LeadEngine
        self._engine = engine = make(hello.options, self._post, self._show)
        writer = threading.Thread(target=self._write, name="link", daemon=True)
        writer.start()
        engine.start()
        self._settled.wait()
        if engine.info is None:
            self._out.put(CannotStart(EngineUnavailable(self._status.fault or "The model could not be loaded.")))
            self._out.put(None)
            writer.join(STOP_S)
            return 1
        versions = {name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)}
        self._out.put(Ready(described(engine.info), os.getpid(), versions))
        while (message := self._read()) is not None:
            self._apply(message, engine)
            if isinstance(message, Stop):
                break
        engine.put(Stop())
        engine.join(STOP_S)
        self._out.put(None)
        writer.join(STOP_S)
        return 0

    # ---- in ---------------------------------------------------------------------------------------------------------

    def _read(self) -> Any:
        """The next message; None once the link is closed."""
        try:
            (length,) = LENGTH.unpack(self._reader.read(LENGTH.size))
            body = self._reader.read(length)
            return self._codec.decode(body) if len(body) == length else None
        except BadFrame as error:
            log.error("The controller said what nobody understands: %s", error)
            return None
        except (OSError, struct.error):
            return None

    def _compile(self, grammar: Grammar) -> Constraint:
        if self._engine is None or self._engine.grammars is None:
            raise EngineUnavailable("This model writes no text that a grammar could bind.")
        return self._engine.grammars.compile(grammar, "grammar")

    def _apply(self, message: Any, engine: EngineThread) -> None:
        match message:
            case StageVersion() | FlipAlias() | DropVersion():
                self._versions.submit(self._change, message, engine)
            case Submit(deadline=seconds) if seconds is not None:
                engine.put(replace(message, deadline=time.monotonic() + seconds))
            case Stop():
                pass
            case _:
                engine.put(message)

    def _change(self, message: VERSIONS, engine: EngineThread) -> None:
        """Runs beside the engine, which only copies what is ready; one after another, so that none overtakes."""
        match message:
            case StageVersion():
                publish = Publish(
                    message.id,
                    message.name,
                    message.bundle,
                    label=message.label,
                    mode=message.mode,
                    dequantize=message.dequantize,
                    provisional=True,
                    number=message.number,
                )
                self._staged[message.name, message.number] = publish
                info = engine.info
                try:
                    parameters = info.weights if info else {}
                    dtype = info.dtype if info else "float32"
                    ready = prepare(message.bundle, dtype, mode=message.mode, parameters=parameters)
                except AdapterError as error:
                    self._out.put([RequestFailed(message.id, from_adapters(error))])
                    return
                engine.put(replace(publish, prepared=ready))
            case FlipAlias():
                known = self._staged[message.name, message.number]
                engine.put(replace(known, id=message.id, provisional=False, label=message.label))
            case DropVersion():
                for name, number in list(self._staged):
                    if name == message.name and message.number in (None, number):
                        del self._staged[name, number]
                engine.put(Delete(message.id, message.name, message.number))

    # ---- out --------------------------------------------------------------------------------------------------------

    def _post(self, events: list[Event]) -> None:
        """What an engine that ends says of its requests is not told: they are drawn again elsewhere."""
        told = [e for e in events if not (isinstance(e, RequestFailed) and isinstance(e.error, EngineEnded))]
        if told:
            self._out.put(told)

    def _show(self, status: EngineStatus) -> None:
        self._status = status
        if status.state != "starting":
            self._settled.set()
        if status.state == "dead" and self._engine is not None and self._engine.info is not None:
            log.critical("The engine of this replica ended, so the replica ends: %s", status.fault)
            os._exit(1)

    def _write(self) -> None:
        told_at, introduced = 0.0, False
        while True:
            try:
                item = self._out.get(timeout=STATUS_S)
            except queue.Empty:
                item = []
            if item is None:
                self._link.shutdown(socket.SHUT_WR)
                return
            messages = item if isinstance(item, list) else [item]
            introduced = introduced or any(isinstance(message, Ready) for message in messages)
            if introduced and self._status is not self._told and time.monotonic() - told_at >= STATUS_S:
                # What is kept of versions is the controller's to tell.
                self._told, told_at = self._status, time.monotonic()
                messages = [*messages, replace(self._told, policies=())]
            try:
                for message in messages:
                    self._link.sendall(self._codec.encode(message))
            except OSError:
                return


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    """A terminal's Ctrl-C and a manager's SIGTERM reach the whole group: the controller is who ends replicas."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure("text")
    load_fast_blas()
    one_thread_for_numpy()
    with socket.socket(fileno=int(sys.argv[1])) as link:
        return Replica(link).run()


if __name__ == "__main__":
    sys.exit(main())
