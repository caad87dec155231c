"""The controller's end of a connection to a replica that is an actor: frames, as calls of its methods."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

from rollout_server.engine.messages.rollouts import RequestFailed
from rollout_server.errors import WeightsMemoryExceeded
from rollout_server.fleet.codec.frames import LENGTHS, BadFrame, Codec, Frame
from rollout_server.fleet.wire import DropVersion, StageVersion

log = logging.getLogger("rollout_server.fleet")


class StoredVersions:
    """Frames of versions in Ray's object store: each version is put there once, and whichever node needs it pulls it
    once. The controller keeps what it would need to put it again, so the store is no more than a way."""

    def __init__(self, ray: Any, codec: Codec) -> None:
        self._ray, self._codec = ray, codec
        self._stored: dict[tuple[str, int], tuple[tuple[Any, ...], asyncio.Task[Any]]] = {}

    async def reference(self, message: StageVersion) -> Any:
        """What stands for the message's frame in a call. Raises Ray's errors where the store has no room."""
        version = (message.name, message.number)
        same = (message.bundle.digest, message.mode, message.label, message.dequantize)
        stored = self._stored.get(version)
        if stored is None or stored[0] != same:
            putting = asyncio.create_task(asyncio.to_thread(self._put, message))
            self._stored[version] = stored = (same, putting)
        try:
            return await asyncio.shield(stored[1])
        except self._ray.exceptions.RayError:
            if self._stored.get(version) is stored:
                del self._stored[version]
            raise

    def _put(self, message: StageVersion) -> Any:
        return self._ray.put(self._codec.encode(message))

    def forget(self, name: str, number: int | None) -> None:
        """Frees a version, or all of a name, in the store."""
        for version in [each for each in self._stored if each[0] == name and number in (None, each[1])]:
            del self._stored[version]


class ActorConnection:
    """A `Connection`. Belongs to the event loop. `number` tells it from earlier ones to the same actor."""

    pid = None
    """The process is of another machine, or might be."""

    def __init__(self, ray: Any, actor: Any, number: int, versions: StoredVersions, codec: Codec) -> None:
        self._ray, self._actor, self._number = ray, actor, number
        self._versions, self._codec = versions, codec
        self._out: asyncio.Queue[bytes | StageVersion] = asyncio.Queue()
        self._in: asyncio.Queue[Frame | RequestFailed | None] = asyncio.Queue()
        self._open = True
        self._tasks = [asyncio.create_task(self._push()), asyncio.create_task(self._pull())]

    def send(self, message: Any) -> None:
        """Messages arrive in their order, or the connection closes; what is sent to a closed one is forgotten."""
        if isinstance(message, DropVersion):
            self._versions.forget(message.name, message.number)
        if self._open:
            self._out.put_nowait(message if isinstance(message, StageVersion) else self._codec.encode(message))

    async def receive(self) -> Any:
        """The next message; None once the connection is closed. Raises `BadFrame`."""
        came = await self._in.get()
        return self._codec.decode(*came) if isinstance(came, tuple) else came

    def kill(self) -> None:
        """Has Ray end the actor's process, which may hang, and start another."""
        if self._open:
            self._close()
            asyncio.get_running_loop().run_in_executor(None, self._end)

    def _end(self) -> None:
        try:
            self._ray.kill(self._actor, no_restart=False)
        except self._ray.exceptions.RayError as error:
            log.warning("Ray could not end an actor: %s", error)

    async def ended(self, within_s: float) -> None:
        """Closes the connection: it is Ray that sees to the process."""
        self._close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _close(self) -> None:
        self._open = False
        for task in self._tasks:
            task.cancel()
        self._in.put_nowait(None)

    # ---- calls ------------------------------------------------------------------------------------------------------

    async def _push(self) -> None:
        """One call at a time, which keeps the order; what gathers meanwhile goes with the next."""
        try:
            while True:
                for part in self._parts(await self._out.get()):
                    frames = part if isinstance(part, bytes) else await self._reference(part)
                    if frames:
                        await self._actor.send.remote(self._number, frames)
        except self._ray.exceptions.RayActorError:
            # Whoever receives is told of it.
            return
        except (self._ray.exceptions.RayError, BadFrame) as error:
            log.error("What a replica was to be told did not reach it: %s", error)
            self.kill()

    def _parts(self, first: bytes | StageVersion) -> Iterator[bytes | StageVersion]:
        """All that waits to be sent; frames that follow each other as one."""
        frames: list[bytes] = []
        waiting = [first, *(self._out.get_nowait() for _ in range(self._out.qsize()))]
        for each in waiting:
            if isinstance(each, bytes):
                frames.append(each)
            else:
                yield b"".join(frames)
                yield each
                frames = []
        yield b"".join(frames)

    async def _reference(self, message: StageVersion) -> Any:
        """None where the store has no room: the replica is as well as before, and the version is refused."""
        try:
            return await self._versions.reference(message)
        except self._ray.exceptions.RayError as error:
            refusal = WeightsMemoryExceeded(f"Ray's object store has no room for {message.name}: {error}")
            self._in.put_nowait(RequestFailed(message.id, refusal))
            return None

    async def _pull(self) -> None:
        came = bytearray()
        try:
            while data := await self._actor.receive.remote(self._number):
                came += data
                for frame in take_whole(came):
                    self._in.put_nowait(frame)
        except self._ray.exceptions.RayError as error:
            log.warning("A replica is gone: %s", str(error).partition("\n")[0])
        self._in.put_nowait(None)


def take_whole(came: bytearray) -> list[Frame]:
    """Takes out of it the frames that have come whole, without their lengths."""
    frames: list[Frame] = []
    at = 0
    while len(came) - at >= LENGTHS.size:
        head, arrays = LENGTHS.unpack_from(came, at)
        begin = at + LENGTHS.size
        middle, end = begin + head, begin + head + arrays
        if end > len(came):
            break
        frames.append((bytes(came[begin:middle]), bytes(came[middle:end])))
        at = end
    # Once for all of them: what stays behind is moved each time.
    del came[:at]
    return frames
