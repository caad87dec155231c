"""A fleet in the place of an engine's thread: the same commands go in, the same events come out, with one status."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rollout_server.engine.messages.control import (
    Abort,
    Leave,
    Leaving,
    LookAtRows,
    Pause,
    Ping,
    Pong,
    Release,
    ResetPrefixCache,
    Resume,
    Stop,
)
from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.messages.rollouts import Command, Event, RequestFailed, RowFinished, Submit, TokensSampled
from rollout_server.engine.messages.scoring import HoldScorer, LetScorerGo, ScoringCommand
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import PolicyCommand, Published
from rollout_server.engine.model.digest import base_digest
from rollout_server.errors import EngineFault, EngineUnavailable, NotFound, RolloutError
from rollout_server.fleet.codec.frames import Codec
from rollout_server.fleet.codec.values import model_info
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import Cancel, Dispatch, Drop, End, Flip, Lose, ReplicaState, Settle, Stage
from rollout_server.fleet.readings import FleetReadings
from rollout_server.fleet.requests import FleetRequests
from rollout_server.fleet.roster import Roster, Source, fleet_status
from rollout_server.fleet.terms import Terms, with_least_room
from rollout_server.fleet.versions import FleetVersions
from rollout_server.fleet.wire import Ready, as_replica, link_codec
from rollout_server.grammar import Constraint, Grammar
from rollout_server.rollout import BASE, PolicyVersion
from rollout_server.text.pictures.reader import PictureReader

if TYPE_CHECKING:
    from rollout_server.engine.sampling.grammars import Grammars

log = logging.getLogger("rollout_server.fleet")

TICK_S, PING_S = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """When a fleet is ready, and when a replica is given up."""

    awaited: int = 1
    """So many have to be live for the fleet to be ready at its start."""
    fewest: int = 1
    """So many have to be live for changes of versions."""
    silent_s: float = 30.0
    """An engine that is not heard of for so long is ended and started again."""
    joined: bool = False
    """Replicas are started by others: which base they shall have is read from the model's files here."""


MakeSource = Callable[[EngineOptions, Codec], Source]
"""Makes what replicas come from. The options are those that each of them is started with, and the codec is the
controller's end of every link."""


class Fleet:
    """Belongs to the event loop on which it is started; `post` and `show` as in `EngineThread`."""

    def __init__(
        self,
        fleet: FleetOptions,
        source: MakeSource,
        options: EngineOptions,
        post: Callable[[list[Event]], None],
        show: Callable[[EngineStatus], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.info: ModelInfo | None = None
        self.tokenizer: Any = None
        self.pictures: PictureReader | None = None
        """Replicas are sent pixels: their towers read them."""
        self.grammars: Grammars | None = None
        self._fleet, self._path = fleet, Path(options.model_path)
        self._terms = Terms(options)
        self._name = options.model_id
        self._tell, self._show_status, self._clock = post, show, clock
        self._shows_soon = False
        self._ledger = Ledger(silent_s=fleet.silent_s)
        self._versions = FleetVersions(self._ledger, self._send, self._act, options.keep_versions, fleet.fewest, clock)
        self._requests = FleetRequests(self._ledger, self._versions, self._post, self._send, clock)
        self._readings = FleetReadings(self._ledger, self._versions, self._post, self._send, self._requests.seen)
        self._roster = Roster(self)
        self._source = source(as_replica(options), link_codec(self._compile))
        self._state = "starting"
        self._fault: str | None = None
        self._ended = threading.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._main: asyncio.Task[None] | None = None

    # ---- the place of a thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._main = asyncio.get_running_loop().create_task(self._run())
        self._main.add_done_callback(self._stopped)

    def _stopped(self, main: asyncio.Task[None]) -> None:
        """Nobody awaits it, and without it nothing goes on: where it fails, the fleet ends and says why."""
        error = None if main.cancelled() else main.exception()
        if error is not None and self._state != "stopping":
            log.critical("The fleet cannot go on.", exc_info=error)
            self._end(error.message if isinstance(error, RolloutError) else f"The fleet cannot go on: {error!r}.")

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def join(self) -> None:
        """Blocks, so not on the event loop."""
        self._ended.wait()

    def put(self, command: Command) -> None:
        match command:
            case Submit():
                self._requests.submit(command)
            case HoldScorer():
                self._readings.read(command)
            case LetScorerGo():
                self._readings.let_go(command)
            case Abort(ids=ids, reason=reason):
                for id in ids:
                    self._requests.abort(id, reason)
                    self._readings.abort(id, reason)
            case Pause() | Resume() | Release() | ResetPrefixCache() | LookAtRows():
                self._readings.order(command)
                if isinstance(command, Pause) and command.mode == "abort":
                    self._requests.pause()
            case Ping(id=id):
                if len(self._ledger.in_state(ReplicaState.LIVE)) >= self._fleet.fewest:
                    self._post([Pong(id)])
            case Leave():
                self._leave(command)
            case Stop():
                self._begin(self._stop())
            case _ if isinstance(command, get_args(ScoringCommand)):
                self._readings.read(command)
            case _ if isinstance(command, get_args(PolicyCommand)):
                self._begin(self._change(command)).add_done_callback(partial(self._changed, command.id))
        self._act()

    def _begin(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _change(self, command: Any) -> None:
        try:
            reply: Event = await self._versions.change(command)
        except RolloutError as error:
            reply = RequestFailed(command.id, error)
        self._post([reply])

    def _changed(self, id: str, task: asyncio.Task[None]) -> None:
        """Whoever asked is answered also where the change ended by what nobody expected."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("A change of versions came to nothing.", exc_info=error)
            self._post([RequestFailed(id, EngineFault(f"The change of versions came to nothing: {error!r}."))])

    def _post(self, events: list[Event]) -> None:
        """As an engine does it: whoever is told that something has ended can see it in the status. All that ends in one
        turn of the event loop is shown once."""
        if not self._shows_soon and not all(isinstance(event, TokensSampled | RowFinished) for event in events):
            self._shows_soon = True
            # Before the events are delivered, which takes a turn, too.
            asyncio.get_running_loop().call_soon(self._show)
        self._tell(events)

    def _compile(self, grammar: Grammar) -> Constraint:
        if self.grammars is None:
            raise EngineUnavailable("The model is still loading.")
        return self.grammars.compile(grammar, "grammar")

    # ---- life -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        pinged = 0.0
        if self._fleet.joined:
            self._terms.base = await asyncio.to_thread(base_digest, self._path)
        self._source.start(self._roster)
        while not self._ended.is_set():
            now = self._clock()
            if now - pinged >= PING_S:
                pinged = now
                for id in self._ledger.replicas:
                    self._send(id, Ping(f"/alive/{id}"))
            self._ledger.tick(now)
            self._requests.tick(now)
            self._act()
            self._show()
            await asyncio.sleep(TICK_S)

    async def _stop(self) -> None:
        self._state = "stopping"
        try:
            await self._roster.stop(self._source)
        finally:
            # Whoever waits is told, whatever went wrong with a replica.
            self._requests.stop()
            self._over()

    def _over(self) -> None:
        if self._main is not None:
            self._main.cancel()
        try:
            self._show()
        finally:
            self._ended.set()

    def fail(self, error: RolloutError) -> None:
        """No replica can be had: the fleet ends, and says why."""
        if self._state == "starting":
            self._end(error.message)

    def give_up(self, error: RolloutError) -> None:
        """The fleet ends, whatever it does, and whoever waits is told why."""
        self._end(error.message)

    def _end(self, fault: str) -> None:
        self._state, self._fault = "dead", fault
        self._roster.kill()
        self._over()

    def _show(self) -> None:
        self._shows_soon = False
        self._show_status(
            fleet_status(
                self._state,
                self._fault,
                self._requests.waiting,
                sum(len(work.missing) for work in self._ledger.waiting),
                self._versions.snapshot(),
                self._readings.paused,
                self._roster.told(self._ledger, self._clock()),
                self._fleet.fewest,
                self._roster.statuses(),
            )
        )

    # ---- replicas ---------------------------------------------------------------------------------------------------

    async def joined(self, id: str, ready: Ready) -> ModelInfo:
        """A replica has loaded its model. Raises `Conflict` for one that computes something else."""
        info = model_info(ready.model)
        self._terms.check(id, info, ready.libraries)
        if self.info is None:
            from rollout_server.fleet.tokens import load_tokenizer

            self.tokenizer, self.grammars, self.pictures = await asyncio.to_thread(load_tokenizer, self._path, info)
            self._versions.base = PolicyVersion(BASE, 0, info.digest)
            self.info = replace(info, id=self._name)
        self.info = with_least_room(self.info, info)
        if self._readings.paused is not None:
            self._send(id, self._readings.paused)
        self._versions.claim(id, ready.held)
        self._ledger.join(id, 2 * info.max_batch, self._clock())
        self._act()
        self._versions.let_claims_go()
        if self._state == "starting" and len(self._ledger.in_state(ReplicaState.LIVE)) >= self._fleet.awaited:
            self._state = "ready"
        self._show()
        return info

    def left(self, id: str) -> bool:
        """Its link is closed; returns whether it had become live. Where all shall stop, nothing is drawn again."""
        self._versions.unclaim(id)
        known = self._ledger.replicas.get(id)
        was_live = known is not None and known.state is not ReplicaState.RESTORING
        if known is not None and self._state != "stopping":
            self._ledger.lost(id)
            self._act()
            self._readings.lost(id)
            self._ledger.remove(id)
            self._act()
            self._show()
        return was_live

    def heard(self, id: str, message: Event) -> None:
        """What a replica says."""
        if isinstance(message, Pong):
            self._ledger.heard(id, self._clock())
        elif message.id.startswith("/stage/"):
            self._staged(id, message)
        elif message.id.startswith("/flip/"):
            if isinstance(message, Published):
                self._ledger.flipped(id, _version_of(message.id))
            else:
                self._roster.end(id, "it could not move an alias")
        elif message.id.isdecimal():
            self._requests.event(int(message.id), message)
        else:
            self._readings.answered(id, message)
        self._act()

    def _staged(self, id: str, message: Event) -> None:
        version = self._versions.staging_of(message.id)
        if version is None:
            return
        if isinstance(message, Published):
            self._versions.staged_on(id, version, message)
        elif isinstance(message, RequestFailed) and not self._versions.refused(id, version, message.error):
            reason = f"it cannot have {version[0]}@{version[1]}: {message.error.message}"
            self._roster.end(id, reason, message.error)

    def _leave(self, leave: Leave) -> None:
        """Gives a replica no more rows and ends it when it has none; or ends it, and its rows go elsewhere. With
        `again` it is started anew."""
        if not self._roster.leave(leave.replica, again=leave.again):
            self._post([RequestFailed(leave.id, NotFound(f"There is no replica {leave.replica}.", param="id"))])
            return
        if leave.at_once or leave.replica not in self._ledger.replicas:
            if leave.replica in self._ledger.replicas:
                self._ledger.leaves(leave.replica)
            self._roster.end(leave.replica, "it was removed")
        else:
            self._ledger.drain(leave.replica)
        self._post([Leaving(leave.id, leave.replica)])

    # ---- what the ledger wants --------------------------------------------------------------------------------------

    def _send(self, id: str, message: Any) -> None:
        self._roster.send(id, message)

    def _act(self) -> None:
        while actions := self._ledger.take():
            for action in actions:
                match action:
                    case Dispatch(attempt):
                        self._requests.dispatch(attempt)
                    case Cancel(id, number):
                        self._send(id, Abort((str(number),), "elsewhere"))
                    case Stage(id, version):
                        self._versions.stage_on(id, version)
                    case Flip(id, version):
                        self._versions.flip_on(id, version)
                    case Drop(id, version):
                        self._versions.drop_on(id, version)
                    case End(id, reason, anew=anew):
                        if anew:
                            self._roster.leave(id, again=True)
                        self._roster.end(id, reason)
                    case Lose(work, samples, reason):
                        self._requests.lose(work, samples, reason)
                    case Settle(change):
                        self._versions.settled(change)
        self._readings.place_waiting()


def _version_of(id: str) -> tuple[str, int]:
    """The version that a message about versions is about."""
    _, _, number, name = id.split("/", 3)
    return name, int(number)
