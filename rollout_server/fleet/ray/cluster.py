"""A Ray cluster that runs: connected to within a time limit, asked what it has, and never started here."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rollout_server.errors import EngineUnavailable, InvalidField

REACH_S, CONNECT_S = 5.0, 60.0
"""Seconds for a connection to the address, and for Ray to make this process one of the cluster's. Left to itself, Ray
tries an address where nobody answers for minutes."""
HEAD_EVERY_S, HEAD_S = 2.0, 30.0
"""Seconds between two looks at the head, and without it until it is taken for lost. After 60 Ray ends whatever is of
the cluster, this process too, with words of its own and before anybody who waits is told."""
log = logging.getLogger("rollout_server.fleet")


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica asks of its node."""

    resource: str
    """As Ray's tables call it."""
    options: dict[str, Any]
    start: str
    """How `ray start` is told that a node has it."""


ONE_MLX = Need("mlx", {"resources": {"mlx": 1}}, """--resources='{"mlx": 1}'""")
ONE_GPU = Need("GPU", {"num_gpus": 1}, "--num-gpus=1")


class Cluster:
    """This process as a driver of a cluster. Its calls block, so not on the event loop, but for those of actors."""

    def __init__(self, ray: Any, address: str, need: Need) -> None:
        self.ray = ray
        self._address, self._need = address, need
        self.head = str(ray.get_runtime_context().gcs_address)
        """Where the process answers without which there is no cluster."""

    def actor(self, kind: type) -> Any:
        """Asks for an actor that Ray places where there is what it needs, and starts again wherever it ends."""
        # Calls run side by side: one waits for what the engine says. None is made twice, since each changes something.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, **self._need.options}
        return self.ray.remote(kind).options(**options).remote()

    def on_one_node(self) -> int:
        """How many replicas may come to share a device. A GPU is one replica's alone."""
        if self._need is ONE_GPU:
            return 1
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return max([1, *(int(resources.get(self._need.resource, 0)) for resources in nodes)])

    def why_not_placed(self, replica: str, replicas: int, within_s: float) -> str:
        """Why an actor has no node yet, as a sentence."""
        name = self._need.resource
        total = self.ray.cluster_resources().get(name, 0)
        free = self.ray.available_resources().get(name, 0)
        late = f"Ray found no place for replica {replica} within {within_s:g} s"
        if total < replicas:
            return (
                f"{late}: each of {replicas} replicas needs one {name}, and the cluster at {self._address} has "
                f"{total:g}. Start nodes that have it (ray start --address=HOST:PORT {self._need.start}), or ask for "
                "fewer --replicas."
            )
        return (
            f"{late}: the cluster at {self._address} has {total:g} {name}, of which {free:g} are free. `ray status` on "
            "one of its nodes says who has them."
        )

    async def without_head(self) -> None:
        """Returns once the head has not answered for `HEAD_S`: rows go on meanwhile, and a head that comes back in time
        (Ray keeps its state where it has a Redis) is as one that was always there."""
        host, _, port = self.head.rpartition(":")
        missing_since: float | None = None
        while True:
            now = asyncio.get_running_loop().time()
            if (error := await _silence(host.strip("[]"), int(port))) is None:
                missing_since = None
            elif missing_since is None:
                missing_since = now
                log.warning("The head of the Ray cluster at %s does not answer (%s).", self.head, error)
            elif now - missing_since >= HEAD_S:
                return
            await asyncio.sleep(HEAD_EVERY_S)

    def close(self) -> None:
        self.ray.shutdown()


async def connect(address: str, need: Need, *, within_s: float = CONNECT_S) -> Cluster:
    """Makes this process a driver of the cluster at `auto` or HOST:PORT. Raises `InvalidField` with what to do where
    Ray is not installed or not there."""
    host, _, port = address.rpartition(":")
    if host:
        await _reach(address, host, int(port))
    try:
        ray = await asyncio.wait_for(asyncio.wrap_future(_beside(lambda: _driver_of(address))), within_s)
    except TimeoutError as error:
        raise InvalidField(
            f"--ray-address {address}: what answers there did not take this process as a part of a Ray cluster within "
            f"{within_s:g} s. Give the address that `ray start --head` printed.",
            param="ray_address",
        ) from error
    _hear_of_the_end_first()
    return Cluster(ray, address, need)


def _hear_of_the_end_first() -> None:
    """Ray has put a handler of SIGTERM before Python's, which writes a trace and has the process aborted three seconds
    later, however well it is ending by then: this takes it out. Only the main thread may, which alone hears signals."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
        signal.siginterrupt(signal.SIGTERM, False)


async def _reach(address: str, host: str, port: int) -> None:
    if (error := await _silence(host, port)) is not None:
        raise InvalidField(
            f"--ray-address {address}: nobody answers there ({error}). Start the cluster first (ray start --head "
            f"--port={port} on its first node), and give that node's address.",
            param="ray_address",
        ) from error


async def _silence(host: str, port: int) -> OSError | None:
    """Why nobody answers at an address; None where somebody does."""
    try:
        async with asyncio.timeout(REACH_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return error
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return None


def _driver_of(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise InvalidField(
            "--ray-address needs Ray, which is not installed: pip install 'rollout-server[ray]', here and on every "
            "node of the cluster.",
            param="ray_address",
        ) from error
    try:
        # Ray's own lines begin with what concerns it alone, such as that it handles no signals here.
        ray.init(address=address, logging_level="error")
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        raise InvalidField(
            f"--ray-address {address}: Ray could not connect: {_cause(error)} This machine has to be a node of the "
            "cluster, with the cluster's versions of Python and Ray: ray start --address=HOST:PORT.",
            param="ray_address",
        ) from error
    return ray


def _cause(error: BaseException) -> str:
    """The first line of what it came from."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{line or type(error).__name__}."


def _beside(work: Callable[[], Any]) -> Future[Any]:
    """What `work` returns or raises, from a thread that nobody waits for: Ray cannot be told to give up."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            found = work()
        except (InvalidField, EngineUnavailable) as error:
            result.set_exception(error)
        else:
            result.set_result(found)

    threading.Thread(target=run, name="ray", daemon=True).start()
    return result
