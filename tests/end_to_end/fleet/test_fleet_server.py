"""Several engines behind one address, over HTTP: told of, pushed to, killed, restarted, drained and restored."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import tiny_models
from tests.support.live_server import live_server, server_here, until
from trainer_client import RolloutClient, TrainerClientError

PROMPTS = [[5, 9, 33], [44], list(range(1, 40))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny")


def adapter(model: Path, seed: int) -> tuple[Any, Any]:
    return tiny_models.random_adapter(tiny_models.linear_layers(model), 4, seed)


def states(client: RolloutClient) -> list[str]:
    return [replica.state for replica in client.fleet()]


def drawn(client: RolloutClient, policy: str) -> list[list[int]]:
    batch = client.rollouts(PROMPTS, policy=policy, n=3, max_tokens=12, seed=3, temperature=1.0)
    return [list(row.token_ids) for row in batch.rollouts]


def pushed_to(url: str, client: RolloutClient, model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Both engines have the last two of three versions. Rows of the base and of the newest."""
    until(lambda: states(client) == ["live", "live"])
    base = drawn(client, "base")
    for step in (1, 2, 3):
        pushed = client.push("policy", *adapter(model, step), label=f"step-{step}")
        assert (pushed.version, pushed.live) == (step, True)
    trained = drawn(client, "policy")
    kept = httpx.get(f"{url}/v1/weights/policy").json()["versions"]
    assert [(v["version"], v["label"], v["replicas"]) for v in kept] == [
        (2, "step-2", {"staged": 2, "of": 2}),
        (3, "step-3", {"staged": 2, "of": 2}),
    ]
    told = [
        'rollout_replica_state{model="base",replica="local-1",state="live"} 1.0',
        'rollout_replica_versions{model="base",replica="local-0"} 2.0',
    ]
    # One that is starved counts as silent for a while.
    until(lambda: (metrics := httpx.get(f"{url}/metrics").text) and all(line in metrics for line in told))
    return base, trained


def test_both_engines_have_what_is_pushed(model: Path) -> None:
    with server_here(model, replicas=2, keep_versions=2) as server, RolloutClient(server.url) as client:
        base, trained = pushed_to(server.url, client, model)
        assert base != trained
        client.drain_replica("local-0")
        until(lambda: [replica.id for replica in client.fleet()] == ["local-1"])
        assert drawn(client, "policy") == trained


@pytest.mark.long
def test_a_server_of_two_engines(model: Path, tmp_path: Path) -> None:
    options = ("--replicas", "2", "--min-replicas", "2", "--state-dir", str(tmp_path / "state"), "--keep-versions", "2")
    with live_server(model, *options) as server, RolloutClient(server.url) as client:
        base, trained = pushed_to(server.url, client, model)
        # Below --min-replicas it says so, and nothing changes; it takes rows all the same.
        os.kill(client.fleet()[0].pid or 0, signal.SIGKILL)
        until(lambda: "live" in states(client) and len(set(states(client))) == 2)
        assert httpx.get(f"{server.url}/ready").status_code == 503 and not client.ready()
        refused = httpx.post(
            f"{server.url}/v1/weights/policy/activate", json={"version": 2}, headers={"x-request-id": "early"}
        )
        assert refused.status_code == 503 and refused.json()["error"]["retryable"], refused.text
        assert drawn(client, "policy@3") == trained
        until(lambda: states(client) == ["live", "live"])
        assert client.ready() and client.fleet()[0].restarts == 1 and client.fleet()[0].versions_staged == 2
        assert drawn(client, "policy") == trained, "nothing had moved"
        assert client.activate("policy", 2).version == 2 and drawn(client, "policy") != trained
        assert client.activate("policy", 3).version == 3 and drawn(client, "policy") == trained
        unknown = httpx.delete(f"{server.url}/v1/fleet/nobody")
        assert unknown.status_code == 404 and "nobody" in unknown.json()["error"]["message"]
        client.drain_replica("local-0")
        until(lambda: [replica.id for replica in client.fleet()] == ["local-1"])
        assert drawn(client, "base") == base
        assert server.stop() == 0
    with live_server(model, *options[:2], *options[4:]) as server, RolloutClient(server.url) as client:
        assert drawn(client, "policy") == trained and drawn(client, "base") == base
        assert [replica.versions_staged for replica in client.fleet()] == [2, 2]
        client.remove_replica("local-1")
        assert drawn(client, "policy") == trained
        with pytest.raises(TrainerClientError, match="no replica"):
            client.remove_replica("local-1")


@pytest.mark.long
def test_work_that_no_replica_is_left_for_is_a_503_once_its_time_is_over(model: Path) -> None:
    with live_server(model, "--replicas", "2") as server, RolloutClient(server.url) as client:
        for id in ("local-0", "local-1"):
            client.remove_replica(id)
        until(lambda: states(client) == [])
        assert httpx.get(f"{server.url}/ready").status_code == 503
        body = {"prompts": [{"token_ids": [5, 9]}], "policy": "base", "timeout_s": 1.0}
        refused = httpx.post(f"{server.url}/v1/rollouts", json=body, timeout=60)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["retryable"]) == (503, "engine_unavailable", True)
        assert "No replica became live until the request's timeout_s was over" in error["message"]
        assert server.stop() == 0


def test_a_server_of_one_process_has_no_replicas(model: Path) -> None:
    with server_here(model, replicas=None) as server, RolloutClient(server.url) as client:
        assert client.fleet() == ()
        with pytest.raises(TrainerClientError, match="no replica"):
            client.drain_replica("local-0")
