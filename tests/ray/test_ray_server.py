"""`serve --ray-address` over HTTP, as its user runs it: engines are killed and drained, and nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from rollout_server.fleet.wire import AGAIN
from tests.support import tiny_models
from tests.support.fleet.ray_nodes import PLACE_S, RayNodes, actor_processes, kill_one
from tests.support.live_server import live_server, server_here, until
from trainer_client import RolloutClient

PATIENT = {"ROLLOUT_REPLICA_PLACE_S": str(PLACE_S)}
PROMPTS = [[5, 9, 33], [44], list(range(1, 40))]


def adapter(path: Path, seed: int) -> tuple[Any, Any]:
    return tiny_models.random_adapter(tiny_models.linear_layers(path), 4, seed)


def drawn(client: RolloutClient, policy: str, tokens: int = 12) -> list[list[int]]:
    batch = client.rollouts(PROMPTS, policy=policy, n=3, max_tokens=tokens, seed=3, temperature=1.0)
    return [list(row.token_ids) for row in batch.rollouts]


def states(client: RolloutClient) -> dict[str, str]:
    return {replica.id: replica.state for replica in client.fleet()}


def test_a_server_whose_engines_ray_places(nodes: RayNodes, path: Path, tmp_path: Path) -> None:
    options = ("--replicas", "2", "--ray-address", nodes.address, "--state-dir", str(tmp_path / "state"))
    with server_here(path) as one, RolloutClient(one.url) as alone:
        alone.push("policy", *adapter(path, 1))
        expected = {policy: drawn(alone, policy) for policy in ("base", "policy")}
        longer = drawn(alone, "policy", 200)
    with live_server(path, *options, environment=PATIENT) as server, RolloutClient(server.url) as client:
        assert states(client) == {"ray-0": "live", "ray-1": "live"}
        pushed = client.push("policy", *adapter(path, 1))
        assert (pushed.version, pushed.live) == (1, True)
        assert {policy: drawn(client, policy) for policy in ("base", "policy")} == expected
        kill_one()
        assert drawn(client, "policy", 200) == longer
        until(lambda: list(states(client).values()) == ["live", "live"])
        assert sum(replica.restarts for replica in client.fleet()) == 1
        client.drain_replica("ray-0")
        until(lambda: states(client) == {"ray-1": "live"})
        until(lambda: len(actor_processes()) == 1)
        assert drawn(client, "policy") == expected["policy"]
        assert server.stop() == 0
        until(lambda: not actor_processes())


def test_engines_end_with_a_server_that_is_killed(nodes: RayNodes, path: Path) -> None:
    options = ("--replicas", "1", "--ray-address", nodes.address)
    with live_server(path, *options, environment=PATIENT) as server:
        assert len(actor_processes()) == 1
        server.process.send_signal(signal.SIGKILL)
        until(lambda: not actor_processes())


def test_a_server_whose_cluster_has_lost_its_head_says_so_and_loses_no_version(path: Path, tmp_path: Path) -> None:
    """Whoever waits is answered by name before the process ends; started again, it has what was pushed."""
    state = ("--state-dir", str(tmp_path / "state"))
    own = RayNodes(1)
    try:
        options = ("--replicas", "1", "--ray-address", own.address, *state)
        with (
            live_server(path, *options, environment=PATIENT) as server,
            RolloutClient(server.url) as client,
            ThreadPoolExecutor(1) as beside,
        ):
            client.push("policy", *adapter(path, 1))
            expected = drawn(client, "policy")
            body = {"prompts": [{"token_ids": [5]}], "policy": "policy", "min_version": 9, "wait_s": 500}
            waits = beside.submit(httpx.post, f"{server.url}/v1/rollouts", json=body, timeout=600)
            own.lose_head()
            assert drawn(client, "policy") == expected, "rows go on for a while"
            refused = waits.result()
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["retryable"]) == (503, "engine_unavailable", True)
            assert "has not answered for 30 s" in error["message"] and "start the cluster anew" in error["message"]
            assert server.process.wait(60) == AGAIN
            until(lambda: error["message"] in server.log[-1])
    finally:
        own.close()
    with live_server(path, *state) as server, RolloutClient(server.url) as client:
        assert drawn(client, "policy") == expected and client.push("policy", *adapter(path, 1)).unchanged


def test_an_address_without_a_cluster_ends_the_command_with_one_sentence() -> None:
    command = [sys.executable, "-m", "rollout_server", "serve", "--port", "0", "--replicas", "2"]
    ended = subprocess.run([*command, "--ray-address", "127.0.0.1:1"], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    assert "--ray-address 127.0.0.1:1: nobody answers there" in ended.stderr
    assert "Traceback" not in ended.stderr
