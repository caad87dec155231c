"""A Ray cluster of several nodes on this machine, and fleets in it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ray.cluster_utils import Cluster

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.fleet.ray.cluster import ONE_MLX, Need
from rollout_server.fleet.ray.placed import Placed, Placement

T = TypeVar("T")
STORE_BYTES = 100_000_000
"""Of each node's object store."""
STARTS = 3
PLACE_S = 240.0
"""Until Ray has started an actor's process: seconds, or minutes on a machine that does ten other things."""


class RayNodes:
    """Belongs to the main thread, in which alone Ray starts nodes. The first one has no place for a replica."""

    def __init__(self, places: int, store_bytes: int = STORE_BYTES) -> None:
        self._store_bytes = store_bytes
        self._cluster = Cluster()
        self._started(num_cpus=0, include_dashboard=False)
        self.nodes = [self.add() for _ in range(places)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        """A node with a place for a replica."""
        return self._started(num_cpus=1, resources={"mlx": 1})

    def _started(self, **options: Any) -> Any:
        """Ray gives a node 30 s to start, which a busy machine may need twice."""
        for left in reversed(range(STARTS)):
            try:
                return self._cluster.add_node(object_store_memory=self._store_bytes, **options)
            except Exception:
                # Ray raises nothing narrower.
                if not left:
                    raise
        raise AssertionError("a node is started at least once")

    def kill(self, node: Any) -> None:
        """Ends all of a node's processes at once, as a machine that loses power does."""
        self._cluster.remove_node(node, allow_graceful=False)

    def lose_head(self) -> None:
        """Ends the process that knows what there is in the cluster; everything else lives on."""
        self._cluster.head_node.kill_gcs_server()

    def close(self) -> None:
        self._cluster.shutdown()


def actor_processes() -> list[int]:
    """The processes of this cluster that hold a replica: Ray writes the actor's class into their title."""
    titles, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
            (told,) = re.findall(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.MULTILINE)
        except OSError:
            # It has ended meanwhile.
            continue
        parents[int(folder.name)] = int(told)

    def ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and ours(parents[process]))

    return sorted(id for id, title in titles.items() if title.startswith(b"ray::ReplicaActor") and ours(id))


def kill_one() -> None:
    os.kill(actor_processes()[0], signal.SIGKILL)


class Running:
    """Handles on an event loop beside the main thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._pool = ThreadPoolExecutor(1)
        self._pool.submit(self._loop.run_forever)

    def begin(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.begin(work).result(300)

    def settle(self) -> None:
        """Waits for what goes on after handles were closed: a process can be Ray's driver only once at a time."""

        async def others() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        self.run(others())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._pool.shutdown()
        self._loop.close()


def engine_options(path: Path) -> EngineOptions:
    return EngineOptions(str(path), "tiny", kv_memory=2**24)


def placed_fleet(
    address: str, path: Path, replicas: int, *, need: Need = ONE_MLX, within_s: float = PLACE_S, silent_s: float = 30.0
) -> EngineHandle:
    source = partial(Placed, Placement(address, replicas, need, within_s))
    return EngineHandle(engine_options(path), partial(Fleet, FleetOptions(replicas, silent_s=silent_s), source))


@contextmanager
def started(running: Running, *handles: EngineHandle) -> Iterator[None]:
    """Handles that are ready. Afterwards they are closed, and this process is no driver of the cluster any more."""

    async def start() -> None:
        for handle in handles:
            handle.start()
        for handle in handles:
            await handle.wait_ready()

    async def close() -> None:
        for handle in handles:
            await handle.close()

    try:
        running.run(start())
        yield
    finally:
        running.run(close())
        running.settle()
