"""A controller and replicas that join it, in one process and on one event loop, with links that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapters.versions.store import StateStore
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.fleet.joining.challenge import PATH
from rollout_server.fleet.joining.dial import Controller
from rollout_server.fleet.joining.door import Door, Lock
from rollout_server.fleet.replica.joiner import Joiner
from rollout_server.rollout import Rollout, RolloutRequest
from rollout_server.versions.publisher import Publisher
from tests.support.fleet.kill_replicas import until

KEY = "a-key-of-thirty-two-characters--"
KEEP = 8


class Asked(asyncio.Protocol):
    """A connection to it."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        head, _, early = data.partition(b"\r\n\r\n")
        assert head.startswith(f"GET {PATH} HTTP/1.1\r\n".encode())
        drawn = next(line.partition(b": ")[2] for line in head.split(b"\r\n") if line.startswith(b"x-fleet-nonce"))
        self._door.enter(self._transport, early, drawn.decode())


class Cable:
    """A way to a port that can be cut: then nothing passes, and neither end is told."""

    def __init__(self, port: int) -> None:
        self.target, self._cut, self._tasks = port, False, set[asyncio.Task[None]]()
        self._whole = asyncio.Event()
        self._whole.set()

    async def lay(self) -> int:
        """Returns the port of its near end."""
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        """What was sent meanwhile is lost: the links that it cut are closed."""
        for task in self._tasks:
            task.cancel()
        self._whole.set()

    async def remove(self) -> None:
        self.mend()
        self._server.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError):
                while said := await source.read(65_536):
                    await self._whole.wait()
                    sink.write(said)
        finally:
            sink.close()


class Led:
    """A controller: its fleet, its versions and its door."""

    def __init__(self, model: Path, state: StateStore, silent_s: float, fewest: int = 1) -> None:
        self.store, self.door = state, Door(Lock(KEY), lambda address: True)
        options = FleetOptions(fewest, fewest, silent_s, joined=True)
        self.handle = EngineHandle(
            EngineOptions(str(model), "tiny", keep_versions=KEEP), partial(Fleet, options, self.door.source)
        )
        self.publisher = Publisher(self.handle, state, KEEP)

    async def open(self, port: int = 0) -> int:
        self.door.belongs_to(self.store.instance)
        self.handle.start()
        self._server = await asyncio.get_running_loop().create_server(lambda: Asked(self.door), "127.0.0.1", port)
        return int(self._server.sockets[0].getsockname()[1])

    async def ready(self) -> None:
        await self.handle.wait_ready()
        await self.publisher.restore()

    async def close(self) -> None:
        self._server.close()
        await self.handle.close()
        await self.publisher.close()
        self.store.close()

    def states(self) -> list[str]:
        return [each.state for each in self.handle.status.replicas]

    async def rows(self, asked: list[RolloutRequest], **more: Any) -> list[Rollout]:
        id = self.handle.new_id("test")
        events = self.handle.submit(id, [replace(group, id=id) for group in asked], **more)
        found = [event.rollout async for event in events if isinstance(event, RowFinished)]
        return sorted(found, key=lambda row: (row.prompt_index, row.sample_index))


@dataclass
class Joined:
    """A replica in this process, at the far end of a cable of its own."""

    model: Path
    name: str
    silent_s: float
    cable: Cable
    weights_memory: int | None = None
    joined: list[str] = field(default_factory=list)

    async def start(self) -> None:
        port = await self.cable.lay()
        at = Controller("127.0.0.1", port, key=KEY)
        options = EngineOptions(str(self.model), "tiny", kv_memory=2**24, weights_memory=self.weights_memory)
        self.joiner = Joiner(at, options, self.silent_s, self.joined.append, self.name)
        self.running = asyncio.create_task(self.joiner.run())

    async def stop(self) -> None:
        self.running.cancel()
        with suppress(asyncio.CancelledError):
            await self.running
        await self.cable.remove()


def driven(work: Coroutine[Any, Any, None], within_s: float = 400.0) -> None:
    asyncio.run(asyncio.wait_for(work, within_s))


async def live(led: Led, count: int) -> None:
    await until(lambda: led.states().count("live") == count)
