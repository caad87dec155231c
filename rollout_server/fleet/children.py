"""Replicas as processes of this machine: started, listened to, and started again when they end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rollout_server.engine.messages.control import Stop
from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.messages.rollouts import Event
from rollout_server.engine.messages.status import EngineStatus, MemoryStatus, ReplicaStatus
from rollout_server.errors import EngineUnavailable, RolloutError
from rollout_server.fleet.codec.frames import BadFrame
from rollout_server.fleet.codec.values import Compile, model_info
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import ReplicaState
from rollout_server.fleet.link import Link, start_child
from rollout_server.fleet.ranks.environment import placed
from rollout_server.fleet.wire import CannotStart, Hello, Ready, link_codec

log = logging.getLogger("rollout_server.fleet")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a replica that ended is started again; each end soon after a start doubles it."""
STEADY_S = 60.0
"""A replica that ran for so long did not end because of how it was started."""
STOP_S = 10.0
"""Seconds that a replica may take to end its step and go."""


class Controller(Protocol):
    """Who is told of replicas."""

    async def joined(self, id: str, info: ModelInfo) -> None: ...

    def left(self, id: str) -> None: ...

    def heard(self, id: str, message: Event) -> None: ...

    def fail(self, error: RolloutError) -> None: ...


@dataclass(slots=True)
class _Child:
    id: str
    devices: tuple[str, ...]
    link: Link | None = None
    info: ModelInfo | None = None
    status: EngineStatus | None = None
    restarts: int = 0
    leaving: bool = False


class Children:
    """Belongs to the event loop. `devices` name the GPUs of all replicas, as many for each, or are empty."""

    def __init__(
        self, count: int, devices: Sequence[str], options: EngineOptions, controller: Controller, compile: Compile
    ) -> None:
        each = len(devices) // count
        self._children = {
            f"local-{index}": _Child(f"local-{index}", tuple(devices[index * each : (index + 1) * each]))
            for index in range(count)
        }
        self._options = options
        self._sharing = 1 if devices else count
        self._controller = controller
        self._codec = link_codec(compile)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._gone = EngineStatus("dead")
        """Counts of replicas that have ended."""

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._keep(child)) for child in self._children.values()]

    def send(self, id: str, message: Any) -> None:
        child = self._children.get(id)
        if child is not None and child.link is not None:
            child.link.send(message)

    def end(self, id: str, reason: str) -> None:
        """Ends a replica's process at once."""
        child = self._children[id]
        log.warning("Replica %s is ended: %s.", id, reason)
        if child.link is not None:
            child.link.kill()

    def leave(self, id: str) -> bool:
        """It is not started again; returns whether it is there."""
        child = self._children.get(id)
        if child is not None:
            child.leaving = True
        return child is not None

    def kill(self) -> None:
        self._stopping = True
        for child in self._children.values():
            if child.link is not None:
                child.link.kill()

    async def stop(self) -> None:
        """Has all replicas end and tell what they still have to say."""
        self._stopping = True
        for id in self._children:
            self.send(id, Stop())
        _, late = await asyncio.wait(self._tasks, timeout=STOP_S)
        if late:
            self.kill()
            await asyncio.wait(late)

    # ---- what is known of them --------------------------------------------------------------------------------------

    def statuses(self) -> list[EngineStatus]:
        """What those that run said last, and the counts of those that have ended."""
        return [self._gone, *(child.status for child in self._children.values() if child.status is not None)]

    def told(self, ledger: Ledger, now: float) -> tuple[ReplicaStatus, ...]:
        return tuple(self._told(child, ledger, now) for child in self._children.values())

    def _told(self, child: _Child, ledger: Ledger, now: float) -> ReplicaStatus:
        known = ledger.replicas.get(child.id)
        starting = child.link is not None and child.link.process.poll() is None
        state = known.state if known else ReplicaState.JOINING if starting else ReplicaState.DEAD
        return ReplicaStatus(
            child.id,
            str(state),
            child.info.device if child.info else None,
            child.link.process.pid if child.link else None,
            known.rows if known else 0,
            len(known.held) if known else 0,
            max(0.0, now - known.heard_at) if known else 0.0,
            child.status.running if child.status else 0,
            child.status.tokens if child.status else 0,
            child.restarts,
            frozenset(known.held) if known else frozenset(),
        )

    # ---- one of them ------------------------------------------------------------------------------------------------

    async def _keep(self, child: _Child) -> None:
        """Runs a replica, again and again."""
        loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_S
        while not self._stopping:
            began = loop.time()
            try:
                await self._serve(child)
            except RolloutError as error:
                log.error("Replica %s could not start: %s", child.id, error)
                self._controller.fail(error)
            self._count(child)
            if self._stopping or child.leaving:
                break
            pause = FIRST_PAUSE_S if loop.time() - began > STEADY_S else min(2 * pause, LONGEST_PAUSE_S)
            log.warning("Replica %s has ended; it is started again in %g s.", child.id, pause)
            child.restarts += 1
            await asyncio.sleep(pause)
        if child.leaving:
            del self._children[child.id]

    async def _serve(self, child: _Child) -> None:
        """Runs a replica until its link closes. Raises what kept it from starting."""
        variables, options = placed(self._options, child.devices)
        link = child.link = start_child(self._codec, variables)
        try:
            await link.open()
            link.send(Hello(options, self._sharing))
            match first := await link.receive():
                case Ready():
                    child.info = model_info(first.model)
                    await self._controller.joined(child.id, child.info)
                case CannotStart(error=error):
                    raise error
                case _:
                    raise EngineUnavailable("its process ended before the model was loaded; its log says why")
            while (message := await link.receive()) is not None:
                if isinstance(message, EngineStatus):
                    child.status = message
                else:
                    self._controller.heard(child.id, message)
        except BadFrame as error:
            log.error("Replica %s said what nobody understands: %s", child.id, error)
            link.kill()
        finally:
            child.link = None
            self._controller.left(child.id)
            await link.ended(STOP_S if self._stopping else 1.0)

    def _count(self, child: _Child) -> None:
        """Counts go on over restarts."""
        last, gone = child.status, self._gone
        if last is not None:
            self._gone = replace(
                gone,
                steps=gone.steps + last.steps,
                tokens=gone.tokens + last.tokens,
                preemptions=gone.preemptions + last.preemptions,
                memory=MemoryStatus(),
            )
        child.status = None
