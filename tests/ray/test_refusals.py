"""A cluster that is not there, or has no place, is refused in a sentence that says what to do."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollout_server.engine.handle import EngineHandle
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.ray.cluster import ONE_GPU
from tests.support.fleet.ray_nodes import RayNodes, Running, placed_fleet


def refusal(running: Running, handle: EngineHandle) -> str:
    async def start() -> None:
        handle.start()
        await handle.wait_ready()

    with pytest.raises(EngineUnavailable) as refused:
        running.run(start())
    running.run(handle.close())
    running.settle()
    return refused.value.message


def test_a_cluster_without_gpus_is_refused_by_their_name(nodes: RayNodes, running: Running, path: Path) -> None:
    said = refusal(running, placed_fleet(nodes.address, path, 1, need=ONE_GPU, within_s=3.0))
    assert said == (
        "Ray found no place for replica ray-0 within 3 s: each of 1 replicas needs one GPU, and the cluster at "
        f"{nodes.address} has 0. Start nodes that have it (ray start --address=HOST:PORT --num-gpus=1), or ask for "
        "fewer --replicas."
    )


def test_a_cluster_with_too_few_places_says_how_many_it_has(nodes: RayNodes, running: Running, path: Path) -> None:
    said = refusal(running, placed_fleet(nodes.address, path, 9, within_s=15.0))
    assert "each of 9 replicas needs one mlx, and the cluster at" in said and " has 2." in said
    assert """ray start --address=HOST:PORT --resources='{"mlx": 1}'""" in said


def test_an_address_where_nobody_answers_is_refused_at_once(running: Running, path: Path) -> None:
    began = time.monotonic()
    said = refusal(running, placed_fleet("127.0.0.1:1", path, 1))
    assert said.startswith("--ray-address 127.0.0.1:1: nobody answers there (") and "ray start --head" in said
    assert time.monotonic() - began < 30


ASKS = """
import asyncio, sys
from rollout_server.errors import InvalidField
from rollout_server.fleet.ray import cluster
try:
    asyncio.run(cluster.connect(sys.argv[1], cluster.ONE_MLX, within_s=5.0))
except InvalidField as error:
    print(error.message)
"""


def test_what_is_no_cluster_is_refused_within_the_limit() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        asked = subprocess.run([sys.executable, "-c", ASKS, address], capture_output=True, text=True, timeout=100)
    assert asked.stdout == (
        f"--ray-address {address}: what answers there did not take this process as a part of a Ray cluster within 5 s. "
        "Give the address that `ray start --head` printed.\n"
    )
