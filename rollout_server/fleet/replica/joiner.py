"""A replica that joins a fleet: it asks its controller for a link, again and again, and keeps what it has meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rollout_server.engine.messages.control import Stop
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.codec.frames import BadFrame
from rollout_server.fleet.joining.dial import Controller, dial
from rollout_server.fleet.link import Link
from rollout_server.fleet.replica.engine import STOP_S, ReplicaEngine
from rollout_server.fleet.wire import CannotStart, Dismissed, Refused, Welcome, as_replica, link_codec
from rollout_server.grammar import Constraint, Grammar

log = logging.getLogger("rollout_server.fleet")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
"""Before a link is asked for again; each time that there is none doubles it."""
STATUS_S, LOOK_S = 0.1, 0.02
BROKEN = (
    OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, BadFrame, EngineUnavailable,
)  # fmt: skip


def own_id() -> str:
    """What the fleet calls this process, also after it was started anew in its own place."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname().partition(".")[0]).strip("-")[:40] or "replica"
    return f"{host}-{uuid.getnode() % 2**16:04x}-{os.getpid()}"


class Joiner:
    """Belongs to an event loop. `silent_s`: a controller that says nothing for so long is cut off; `joined` is told of
    the id by which the fleet knows this replica, `id`."""

    def __init__(
        self, controller: Controller, options: EngineOptions, silent_s: float, joined: Callable[[str], None], id: str
    ) -> None:
        self._controller = controller
        self._options = as_replica(options)
        self._silent_s = silent_s
        self._joined = joined
        self._id = id
        self._codec = link_codec(self._compile)
        self._engine: ReplicaEngine | None = None
        self._instance: str | None = None
        """Whose versions are here."""
        self._process = secrets.token_hex(16)
        """What tells this process from another one of its name."""
        self._link: Link | None = None
        self._loop = asyncio.get_running_loop()

    async def run(self) -> bool:
        """Serves until the fleet needs it no longer; returns whether it is to be started anew. Raises `RolloutError`
        where it is not taken, or its model cannot be loaded."""
        pause = FIRST_PAUSE_S
        try:
            while True:
                try:
                    link, welcome = await dial(self._controller, self._id, self._codec, self._process)
                except BROKEN as error:
                    log.warning("No link to %s (%r); asking again in %g s.", self._controller.url, error, pause)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
                pause = FIRST_PAUSE_S
                last = await self._serve(link, welcome)
                if last is not None:
                    log.info("The fleet lets this replica go: %s.", last.reason)
                    return last.again
                log.warning("The link to %s has closed; what it was for ends here.", self._controller.url)
                await asyncio.sleep(pause)
        finally:
            if self._engine is not None:
                await asyncio.to_thread(self._engine.stop)

    # ---- one link ---------------------------------------------------------------------------------------------------

    async def _serve(self, link: Link, welcome: Welcome) -> Dismissed | None:
        """Does what is said over a link, until it closes or the replica is dismissed."""
        telling: asyncio.Task[None] | None = None
        try:
            engine = await self._made_ready(link, welcome)
            self._link = link
            link.send(engine.ready())
            telling = asyncio.create_task(self._tell_status(link, engine))
            return await self._listen(link, engine)
        except BadFrame as error:
            log.error("The controller said what nobody understands: %s", error)
            return None
        finally:
            self._link = None
            if telling is not None:
                telling.cancel()
            if self._engine is not None:
                self._engine.leave_work("disconnect")
            link.kill()

    async def _made_ready(self, link: Link, welcome: Welcome) -> ReplicaEngine:
        """The engine, with nothing that it still does for an earlier link."""
        if self._engine is None:
            self._engine = ReplicaEngine(self._options, self._hand_on)
            first = await asyncio.to_thread(self._engine.load)
            if isinstance(first, CannotStart):
                link.send(first)
                raise first.error
        elif self._instance != welcome.instance:
            await asyncio.to_thread(self._engine.forget_versions)
        self._instance = welcome.instance
        await self._quiet(self._engine)
        return self._engine

    async def _quiet(self, engine: ReplicaEngine) -> None:
        """Ids begin anew with a controller: what was said of an earlier one's must not be taken for this one's."""
        end = asyncio.get_running_loop().time() + STOP_S
        while engine.busy:
            if asyncio.get_running_loop().time() > end:
                raise EngineUnavailable(
                    f"The engine of this replica has not answered for {STOP_S:g} s: it hangs, so the replica ends."
                )
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(0)

    async def _listen(self, link: Link, engine: ReplicaEngine) -> Dismissed | None:
        taken = False
        while True:
            try:
                message = await asyncio.wait_for(link.receive(), self._silent_s)
            except TimeoutError:
                log.warning("The controller has said nothing for %g s.", self._silent_s)
                return None
            match message:
                case None:
                    return None
                case Refused(error=error):
                    raise error
                case Dismissed():
                    return message
                case Stop():
                    # The controller stops and waits for what there is of its rows.
                    engine.leave_work("stopping")
                    await self._quiet(engine)
                    return None
                case _:
                    if not taken:
                        # The first command: what it was compared with is as it should be.
                        taken = True
                        self._joined(self._id)
                    engine.apply(message)

    # ---- what the engine says ---------------------------------------------------------------------------------------

    def _hand_on(self, messages: list[Any]) -> None:
        """Called on the engine's threads."""
        with suppress(RuntimeError):  # The loop is closed: nobody is left to tell.
            self._loop.call_soon_threadsafe(self._send, messages)

    def _send(self, messages: list[Any]) -> None:
        for message in messages:
            if self._link is not None:
                self._link.send(message)

    async def _tell_status(self, link: Link, engine: ReplicaEngine) -> None:
        told = None
        while True:
            if engine.status is not told:
                told = engine.status
                # What is kept of versions is the controller's to tell.
                link.send(replace(told, policies=()))
            await asyncio.sleep(STATUS_S)

    def _compile(self, grammar: Grammar) -> Constraint:
        if self._engine is None:
            raise EngineUnavailable("The model is still loading.")
        return self._engine.compile(grammar)
