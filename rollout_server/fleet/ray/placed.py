"""Where replicas come from in a Ray cluster: as many actors as are asked for, each wherever Ray finds it a place."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.errors import EngineFault, EngineUnavailable, RolloutError
from rollout_server.fleet.codec.frames import Codec
from rollout_server.fleet.ray.actor import ReplicaActor
from rollout_server.fleet.ray.cluster import HEAD_S, Cluster, Need, connect
from rollout_server.fleet.ray.connection import ActorConnection, StoredVersions
from rollout_server.fleet.roster import Roster
from rollout_server.fleet.wire import AGAIN, Hello

log = logging.getLogger("rollout_server.fleet")

RETRY_S = 0.5
"""Between two questions to an actor that Ray is starting again."""
TOLD_S = 3.0
"""Seconds that replies take to reach whoever is told that the head is lost."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which cluster, how many replicas, and what each asks of its node. One that has no place after `within_s` is
    said to have none: at the server's start that ends it, and later it is asked for again."""

    address: str
    replicas: int
    need: Need
    within_s: float = 60.0


@dataclass(slots=True)
class _Place:
    id: str
    actor: Any = None
    """None until it is asked for, and where Ray has given it up."""


class Placed:
    """A `Source`. Ray starts an actor again wherever it ends; its engine begins with the first word that it is told."""

    def __init__(self, placement: Placement, options: EngineOptions, codec: Codec) -> None:
        self._placement, self._options, self._codec = placement, options, codec
        self._numbers = itertools.count(1)
        self._opening: set[asyncio.Task[Any]] = set()
        self._main: asyncio.Task[None] | None = None

    def start(self, roster: Roster) -> None:
        self._main = asyncio.create_task(self._run(roster))
        self._main.add_done_callback(partial(self._ended, roster))

    def _ended(self, roster: Roster, main: asyncio.Task[None]) -> None:
        """Nobody awaits it before the server stops."""
        if not main.cancelled() and (error := main.exception()) is not None:
            log.error("Ray's replicas are not kept any more.", exc_info=error)
            roster.refuse(EngineFault(f"Replicas cannot be placed: {error!r}."))

    async def stop(self) -> None:
        for task in self._opening:
            task.cancel()
        if self._main is not None:
            await asyncio.wait([self._main])

    async def _run(self, roster: Roster) -> None:
        try:
            cluster = await self._asked_for(connect(self._placement.address, self._placement.need))
        except RolloutError as error:
            roster.refuse(error)
            return
        try:
            versions = StoredVersions(cluster.ray, self._codec)
            sharing = await asyncio.to_thread(cluster.on_one_node)
            hello = Hello(replace(self._options, sharing=sharing), sharing)
            places = [_Place(f"ray-{index}") for index in range(self._placement.replicas)]
            watching = asyncio.create_task(self._watch(roster, cluster))
            watching.add_done_callback(partial(self._ended, roster))
            self._opening.add(watching)
            kept = (self._keep(roster, cluster, place, versions, hello) for place in places)
            for ended in await asyncio.gather(*kept, return_exceptions=True):
                if isinstance(ended, Exception):
                    log.error("A replica is not kept any more.", exc_info=ended)
        finally:
            await asyncio.to_thread(cluster.close)

    async def _watch(self, roster: Roster, cluster: Cluster) -> None:
        """Without its head the cluster is over. Whoever waits is told so by name, and then this process ends: it would
        be ended by Ray, whose own way out waits for the head."""
        await cluster.without_head()
        why = (
            f"The head of the Ray cluster at {cluster.head} has not answered for {HEAD_S:g} s, and Ray keeps nothing "
            "running without it: start the cluster anew, and then this server, which with --state-dir has every "
            "version again."
        )
        asyncio.get_running_loop().call_later(TOLD_S, _leave, why)
        roster.give_up(EngineUnavailable(why))

    async def _asked_for(self, work: Awaitable[Any]) -> Any:
        """What may last for long, and is given up when the source stops."""
        task = asyncio.ensure_future(work)
        self._opening.add(task)
        try:
            return await task
        finally:
            self._opening.discard(task)

    async def _keep(
        self, roster: Roster, cluster: Cluster, place: _Place, versions: StoredVersions, hello: Hello
    ) -> None:
        opening: Callable[[], Awaitable[ActorConnection]] = partial(self._placed, cluster, place, versions)
        try:
            await roster.keep(place.id, lambda: self._asked_for(opening()), hello)
        finally:
            if place.actor is not None:
                await asyncio.to_thread(cluster.ray.kill, place.actor)

    async def _placed(self, cluster: Cluster, place: _Place, versions: StoredVersions) -> ActorConnection:
        """Waits until the replica has a place and a fresh process there. Raises `EngineUnavailable` after a while."""
        ray, within_s = cluster.ray, self._placement.within_s
        if place.actor is None:
            place.actor = await asyncio.to_thread(cluster.actor, ReplicaActor)
        number = next(self._numbers)
        try:
            async with asyncio.timeout(within_s):
                await self._opened(ray, place, number)
        except TimeoutError as error:
            why = await asyncio.to_thread(cluster.why_not_placed, place.id, self._placement.replicas, within_s)
            raise EngineUnavailable(why) from error
        return ActorConnection(ray, place.actor, number, versions, self._codec)

    async def _opened(self, ray: Any, place: _Place, number: int) -> None:
        """Returns once a fresh process of the actor listens to this connection; Ray may take any time for it."""
        while True:
            try:
                await place.actor.open.remote(number)
            except ray.exceptions.ActorUnavailableError:
                # It is being started again, or the engine that it held has just been ended.
                await asyncio.sleep(RETRY_S)
            except ray.exceptions.RayActorError as error:
                place.actor = None
                raise EngineUnavailable(f"Ray gave replica {place.id} up: {error}") from error
            else:
                return


def _leave(why: str) -> None:
    """Ends the process, as one that is to be started again."""
    sys.stderr.write(f"rollout-server: {why}\n")
    sys.stderr.flush()
    os._exit(AGAIN)
