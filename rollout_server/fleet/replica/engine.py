"""An engine as a replica has it: what a controller says is done, and what the engine says is handed on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from adapters.errors import AdapterError
from adapters.prepare import prepare
from rollout_server.adapter_errors import from_adapters
from rollout_server.engine.messages.control import Abort, Pause, Ping, Resume, Stop
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import (
    Admitted,
    AwaitsVersion,
    Event,
    RequestFailed,
    RowFinished,
    Submit,
    TokensSampled,
)
from rollout_server.engine.messages.scoring import HoldScorer, LetScorerGo, ScoringCommand
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Delete, Publish, Published
from rollout_server.engine.thread import EngineThread
from rollout_server.errors import EngineEnded, EngineFault, EngineUnavailable
from rollout_server.fleet.codec.values import described
from rollout_server.fleet.ledger.records import Version
from rollout_server.fleet.ranks.lead import LeadEngine
from rollout_server.fleet.replica.calls import CallsInOrder
from rollout_server.fleet.wire import (
    AGAIN,
    VERSIONS,
    AdoptVersion,
    CannotStart,
    DropVersion,
    FlipAlias,
    HeldVersion,
    Ready,
    StageVersion,
    libraries,
)
from rollout_server.grammar import Constraint, Grammar

log = logging.getLogger("rollout_server.fleet")

ON_THE_WAY = (Admitted, AwaitsVersion, TokensSampled, RowFinished)
"""What is said of a request that goes on."""
STOP_S = 60.0
"""An engine that is told to stop has so long to end its step."""


class ReplicaEngine:
    """Belongs to one thread, which `apply`s; another makes versions ready, in their order. `tell` is given what the
    engine says, on any thread. A replica whose engine cannot compute must not look alive, so its process ends."""

    def __init__(self, options: EngineOptions, tell: Callable[[list[Any]], None]) -> None:
        self.status = EngineStatus("starting")
        self._tell = tell
        self._settled = threading.Event()
        self._staged: dict[Version, Publish] = {}
        self._told: dict[Version, Published] = {}
        """What the engine said of versions that it has staged."""
        self._versions = CallsInOrder("versions")
        self._open: set[str] = set()
        """What is not answered yet."""
        self._scorers: set[str] = set()
        self._paused = False
        make = EngineThread if options.ranks is None else LeadEngine
        self._engine = make(options, self._post, self.show)

    def load(self) -> Ready | CannotStart:
        """Blocks until the model is loaded, or cannot be."""
        self._engine.start()
        self._settled.wait()
        if self._engine.info is None:
            return CannotStart(EngineUnavailable(self.status.fault or "The model could not be loaded."))
        return self.ready()

    def ready(self) -> Ready:
        """What a controller is told of the model, and of the versions that are here."""
        if self._engine.info is None:
            raise EngineUnavailable("The model is still loading.")
        held = tuple(
            HeldVersion(*version, self._staged[version].bundle.digest, self._staged[version].mode or "adapter")
            for version in list(self._told)
            if version in self._staged
        )
        return Ready(described(self._engine.info), os.getpid(), libraries(), held)

    def compile(self, grammar: Grammar) -> Constraint:
        """Makes a grammar ready for the model's tokenizer."""
        if self._engine.grammars is None:
            raise EngineUnavailable("This model writes no text that a grammar could bind.")
        return self._engine.grammars.compile(grammar, "grammar")

    def stop(self) -> None:
        """Ends the engine; blocks until it has said its last. Nobody waits for versions that are not ready yet."""
        self._versions.stop()
        self._engine.put(Stop())
        self._engine.join(STOP_S)

    # ---- in ---------------------------------------------------------------------------------------------------------

    def apply(self, message: Any) -> None:
        """Has the engine do what a controller says."""
        match message:
            case StageVersion() | AdoptVersion() | FlipAlias() | DropVersion():
                self._versions.submit(self._change, message).add_done_callback(partial(self._changed, message.id))
                return
            case Submit(id=id, deadline=seconds):
                self._open.add(id)
                if seconds is not None:
                    message = replace(message, deadline=time.monotonic() + seconds)
            case HoldScorer(id=id):
                self._open.add(id)
                self._scorers.add(id)
            case LetScorerGo(id=id):
                self._scorers.discard(id)
            case Pause() | Resume():
                self._paused = isinstance(message, Pause)
            case _ if isinstance(message, ScoringCommand):
                self._open.add(message.id)
        self._engine.put(message)

    def leave_work(self, reason: str) -> None:
        """Nobody is left to tell of what is open: it ends, and the engine is as it began, but for its versions."""
        if self._open:
            self._engine.put(Abort(tuple(self._open), reason))
        for id in self._scorers:
            self._engine.put(LetScorerGo(id))
        self._scorers.clear()
        if self._paused:
            self._paused = False
            self._engine.put(Resume("/resume"))
        # It is quiet once it has answered this, too: an engine that hangs never is.
        self._open.add("/quiet")
        self._engine.put(Ping("/quiet"))

    def forget_versions(self) -> None:
        """They are of another fleet."""
        self._versions.submit(self._forget).result()

    def _forget(self) -> None:
        for name in {name for name, _ in self._staged}:
            self._change(DropVersion(f"/drop/0/{name}", name, None))

    @property
    def busy(self) -> bool:
        """Something is not answered yet."""
        return bool(self._open)

    def _changed(self, id: str, change: Future[None]) -> None:
        """Whoever asked is answered also where the change ended by what nobody expected."""
        error = None if change.cancelled() else change.exception()
        if error is not None:
            log.error("A change of versions came to nothing.", exc_info=error)
            self._tell([RequestFailed(id, EngineFault(f"The replica could not change a version: {error!r}."))])

    def _change(self, message: VERSIONS) -> None:
        """Runs beside the engine, which only copies what is ready; one after another, so that none overtakes."""
        match message:
            case StageVersion():
                self._stage(message)
            case AdoptVersion():
                self._tell([replace(self._told[message.name, message.number], id=message.id)])
            case FlipAlias():
                known = self._staged[message.name, message.number]
                self._engine.put(replace(known, id=message.id, provisional=False, label=message.label))
            case DropVersion():
                for name, number in list(self._staged):
                    if name == message.name and message.number in (None, number):
                        del self._staged[name, number]
                        self._told.pop((name, number), None)
                self._engine.put(Delete(message.id, message.name, message.number))

    def _stage(self, stage: StageVersion) -> None:
        publish = Publish(
            stage.id,
            stage.name,
            stage.bundle,
            label=stage.label,
            mode=stage.mode,
            dequantize=stage.dequantize,
            provisional=True,
            number=stage.number,
        )
        self._staged[stage.name, stage.number] = publish
        info = self._engine.info
        try:
            parameters, dtype = (info.weights, info.dtype) if info else ({}, "float32")
            ready = prepare(stage.bundle, dtype, mode=stage.mode, parameters=parameters)
        except AdapterError as error:
            self._tell([RequestFailed(stage.id, from_adapters(error))])
            return
        self._engine.put(replace(publish, prepared=ready))

    # ---- out --------------------------------------------------------------------------------------------------------

    def _post(self, events: list[Event]) -> None:
        """What an engine that ends says of its requests is not told: they are drawn again elsewhere."""
        told = [e for e in events if not (isinstance(e, RequestFailed) and isinstance(e.error, EngineEnded))]
        for event in told:
            if isinstance(event, Published) and event.id.startswith("/stage/"):
                self._told[event.version.name, event.version.number] = event
        ends = [event.id for event in told if not isinstance(event, ON_THE_WAY)]
        # The status first: whoever is told of an end can see it. What is kept of versions is the controller's to tell.
        before = [replace(self.status, policies=())] if ends else []
        if told:
            self._tell([*before, *told])
        # Whoever waits until nothing is open finds that all of it was handed on.
        self._open.difference_update(ends)

    def show(self, status: EngineStatus) -> None:
        self.status = status
        if status.state != "starting":
            self._settled.set()
        if status.state == "dead" and self._engine.info is not None:
            log.critical("The engine of this replica ended, so the replica ends: %s", status.fault)
            os._exit(AGAIN)
