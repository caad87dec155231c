"""A replica that cannot be started just now is started later."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.messages.rollouts import Event, RequestFailed
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import Publish
from rollout_server.errors import EngineFault, RolloutError, WeightsMemoryExceeded
from rollout_server.fleet.codec.values import described
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.fleet.roster import Connection, Roster
from rollout_server.fleet.wire import Ready, Refused
from tests.support.fleet.kill_replicas import until

INFO = ModelInfo("tiny", "sha256:1", "qwen3", 320, 2048, "float32", None, (1,), 1000, {}, 96, 2**24, "slots", 8, "cpu")
READY = Ready(described(INFO), 1, {})


class Told:
    def __init__(self) -> None:
        self.failures: list[str] = []
        self.live = False
        self.fault: Exception | None = None

    async def joined(self, id: str, ready: Ready) -> ModelInfo:
        if self.fault is not None:
            raise self.fault
        return ready.model.info

    def left(self, id: str) -> bool:
        return self.live

    def heard(self, id: str, message: Event) -> None: ...

    def fail(self, error: RolloutError) -> None:
        self.failures.append(error.message)

    def give_up(self, error: RolloutError) -> None: ...


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


class Passing:
    """A source of replicas that load their model, say that they are ready, and are gone."""

    def __init__(self) -> None:
        self.opened, self.sent = 0, list[Any]()
        self.said: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def pid(self) -> int | None:
        return None

    async def open(self) -> Connection:
        self.opened += 1
        self.said.put_nowait(READY)
        self.said.put_nowait(None)
        return self

    def send(self, message: Any) -> None:
        self.sent.append(message)

    async def receive(self) -> Any:
        return await self.said.get()

    def kill(self) -> None: ...

    async def ended(self, within_s: float) -> None: ...

    def start(self, roster: Roster) -> None:
        self.task = asyncio.create_task(roster.keep("one", self.open, "hello"))

    async def stop(self) -> None:
        await self.task


def test_starts_that_come_to_nothing_are_put_off_also_where_the_model_was_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene(live: bool) -> list[str]:
        caplog.clear()
        told, source = Told(), Passing()
        told.live = live
        roster = Roster(told)
        source.start(roster)
        await until(lambda: source.opened == 2)
        await asyncio.wait_for(roster.stop(source), 30)
        return [message.rpartition(" in ")[2] for message in caplog.messages if "started again" in message]

    assert asyncio.run(scene(live=True))[0] == "0.5 s."
    assert asyncio.run(scene(live=False))[0] == "1 s."


def test_what_nobody_expected_is_a_start_that_failed() -> None:
    async def scene() -> None:
        told, source = Told(), Passing()
        told.fault = KeyError("a fault of ours")
        roster = Roster(told)
        source.start(roster)
        await until(lambda: source.opened == 2)
        await asyncio.wait_for(roster.stop(source), 30)
        assert told.failures[0] == "Replica one could not be served: KeyError('a fault of ours')."

    asyncio.run(scene())


def test_one_that_cannot_have_a_version_is_told_so() -> None:
    async def scene() -> None:
        source, roster = Passing(), Roster(Told())
        source.said.put_nowait(READY)
        serving = asyncio.create_task(roster.serve("one", source, "hello"))
        await until(source.said.empty)
        refusal = WeightsMemoryExceeded("It has no room.")
        roster.end("one", "it cannot have p@1", refusal)
        source.said.put_nowait(None)
        assert not await serving
        assert source.sent == ["hello", Refused(refusal)]

    asyncio.run(scene())


class Faulty(Nobody):
    def start(self, roster: Roster) -> None:
        raise KeyError("a fault of ours")


def test_a_fleet_that_cannot_go_on_ends_and_says_why() -> None:
    async def scene() -> None:
        shown: list[EngineStatus] = []
        options = EngineOptions("nowhere", "tiny")
        fleet = Fleet(FleetOptions(), lambda options, codec: Faulty(), options, lambda events: None, shown.append)
        fleet.start()
        await until(lambda: not fleet.is_alive())
        assert (shown[-1].state, shown[-1].fault) == ("dead", "The fleet cannot go on: KeyError('a fault of ours').")

    asyncio.run(scene())


def test_a_change_of_versions_that_fails_as_nobody_expected_is_answered() -> None:
    async def scene() -> None:
        posted: list[Event] = []
        options = EngineOptions("nowhere", "tiny")
        fleet = Fleet(FleetOptions(), lambda options, codec: Nobody(), options, posted.extend, lambda status: None)
        no_bundle: Any = None
        fleet.put(Publish("push", "trained", no_bundle))
        await until(lambda: posted)
        (failed,) = posted
        assert isinstance(failed, RequestFailed) and failed.id == "push" and isinstance(failed.error, EngineFault)

    asyncio.run(scene())


class Slow(Passing):
    """Its place is found only when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.killed = asyncio.Event(), False

    async def open(self) -> Connection:
        self.opened += 1
        await self.found.wait()
        return self

    def kill(self) -> None:
        self.killed = True


def test_one_that_is_removed_while_it_waits_for_a_place_does_not_join() -> None:
    async def scene() -> None:
        source, roster = Slow(), Roster(Told())
        source.start(roster)
        await until(lambda: source.opened == 1)
        assert roster.leave("one", again=False)
        source.found.set()
        await asyncio.wait_for(source.task, 30)
        assert source.killed and source.sent == []
        assert not roster.leave("one", again=False), "it is not there"

    asyncio.run(scene())
