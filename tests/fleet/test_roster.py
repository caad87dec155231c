"""A replica that cannot be started just now is started later."""

from __future__ import annotations

import asyncio

from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.rollouts import Event
from rollout_server.errors import RolloutError
from rollout_server.fleet.roster import Connection, Roster
from rollout_server.fleet.wire import Ready
from tests.support.fleet.kill_replicas import until


class Told:
    def __init__(self) -> None:
        self.failures: list[str] = []

    async def joined(self, id: str, ready: Ready) -> ModelInfo:
        raise AssertionError(id)

    def left(self, id: str) -> None: ...

    def heard(self, id: str, message: Event) -> None: ...

    def fail(self, error: RolloutError) -> None:
        self.failures.append(error.message)


class Nobody:
    """A source whose machine has no file left."""

    def __init__(self) -> None:
        self.asked = 0

    async def open(self) -> Connection:
        self.asked += 1
        raise OSError(24, "Too many open files")

    def start(self, roster: Roster) -> None:
        self.task = asyncio.create_task(roster.keep("one", self.open, "hello"))

    async def stop(self) -> None:
        await self.task


def test_a_machine_that_has_nothing_left_is_asked_again() -> None:
    async def scene() -> None:
        told, source = Told(), Nobody()
        roster = Roster(told)
        source.start(roster)
        await until(lambda: source.asked == 2)
        assert told.failures[0] == "Replica one could not be started: [Errno 24] Too many open files."
        # It waits for its next try, and is not waited for.
        await asyncio.wait_for(roster.stop(source), 30)

    asyncio.run(scene())
