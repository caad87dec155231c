"""Replicas that join a controller, as on machines of their own: let in, refused by name, lost, and adopted again."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import tiny_models
from tests.support.fleet.certificates import certificate
from tests.support.fleet.machines import Machine, controller, machine, replica
from tests.support.live_server import server_here, until
from trainer_client import RolloutClient

PROMPTS = [[5, 9, 33], [44], list(range(1, 40))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny")


def adapter(model: Path, seed: int) -> tuple[Any, Any]:
    return tiny_models.random_adapter(tiny_models.linear_layers(model), 4, seed)


def ready(url: str) -> bool:
    return httpx.get(f"{url}/ready", timeout=60).status_code == 200


def states(client: RolloutClient) -> list[str]:
    return [each.state for each in client.fleet()]


def drawn(client: RolloutClient, policy: str) -> list[list[int]]:
    batch = client.rollouts(PROMPTS, policy=policy, n=3, max_tokens=12, seed=3, temperature=1.0)
    return [list(row.token_ids) for row in batch.rollouts]


@pytest.mark.long
def test_replicas_join_are_filled_and_outlive_their_controller(model: Path, tmp_path: Path) -> None:
    with controller(model, tmp_path / "state") as first, RolloutClient(first.url) as client:
        assert not ready(first.url), "nobody has joined"
        with replica(model, first.url) as one:
            one.wait_for("has joined")
            until(lambda: ready(first.url))
            pushed = client.push("policy", *adapter(model, 1))
            trained = drawn(client, "policy")
            with replica(model, first.url) as two:
                two.wait_for("has joined")
                until(lambda: states(client) == ["live", "live"])
                assert [each.versions_staged for each in client.fleet()] == [1, 1], "restored before it is live"
                assert all(each.pid is None for each in client.fleet())
                # A second controller of these versions is refused, and the fleet goes on.
                with machine("--fleet", "--state-dir", str(tmp_path / "state"), "--model", str(model)) as second:
                    second.wait_for("in use by another server")
                    assert second.process.wait(30) != 0
                two.process.kill()
                until(lambda: states(client) == ["live", "dead"])
            assert drawn(client, "policy") == trained
            first.process.kill()
            first.process.wait()
            port = int(first.url.rpartition(":")[2])
            with controller(model, tmp_path / "state", port=port) as again, RolloutClient(again.url) as client:
                until(lambda: ready(again.url))
                assert drawn(client, "policy") == trained and client.push("policy", *adapter(model, 1)).unchanged
                assert pushed.version == 1 and again.said("has policy@1 already")
                client.drain_replica(client.fleet()[0].id)
                assert one.process.wait(60) == 0 and one.said("it was drained")
                until(lambda: states(client) == [])
                assert again.stop() == 0


@pytest.mark.long
def test_a_server_that_is_told_to_stop_before_it_is_ready_does_so_without_a_word_of_error(
    model: Path, tmp_path: Path
) -> None:
    with controller(model, tmp_path / "state") as alone:
        assert alone.stop() == 0
        assert not alone.said("cannot start"), "".join(alone.log)


@pytest.mark.long
def test_a_replica_that_is_unlike_the_others_is_refused_with_a_sentence(model: Path, tmp_path: Path) -> None:
    other = tiny_models.build("qwen3", tmp_path / "other", seed=1)
    with ExitStack() as machines:
        fleet = machines.enter_context(controller(model, tmp_path / "state", "--served-model-name", "ours"))
        began: list[tuple[Machine, str]] = [
            (machines.enter_context(replica(other, fleet.url)), r"its base is sha256:\w+, and the fleet's is sha256:"),
            (
                machines.enter_context(replica(model, fleet.url, key="k" * 20)),
                "set ROLLOUT_FLEET_KEY to the controller",
            ),
            (machines.enter_context(replica(model, fleet.url, key=None)), "set ROLLOUT_FLEET_KEY to the controller"),
            (machines.enter_context(replica(model, fleet.url.replace("http", "https"))), "has no certificate"),
        ]
        good = machines.enter_context(replica(model, fleet.url))
        for refused, said in began:
            refused.wait_for(said)
            assert refused.process.wait(60) != 0
        good.wait_for("has joined")
        until(lambda: ready(fleet.url))
        with RolloutClient(fleet.url) as client:
            assert states(client) == ["live"] and drawn(client, "base")
            cards = httpx.get(f"{fleet.url}/v1/models", timeout=60).json()["data"]
            assert [card["id"] for card in cards] == ["base", "ours"]
            late = machines.enter_context(replica(model, fleet.url, "--context-length", "512"))
            late.wait_for("its context is 512, and the fleet's is 2048")
            assert late.process.wait(60) != 0 and states(client) == ["live"]
        assert good.stop() == 0


@pytest.mark.long
def test_replicas_are_started_anew_one_by_one_and_nobody_notices(model: Path, tmp_path: Path) -> None:
    own, private = certificate(tmp_path, "own")
    files = ("--fleet-cert", str(own), "--fleet-key-file", str(private))
    with ExitStack() as machines:
        fleet = machines.enter_context(controller(model, tmp_path / "state", *files))
        secured = fleet.url.replace("http", "https")
        joined = [machines.enter_context(replica(model, secured, "--fleet-cert", str(own))) for _ in range(2)]
        client = machines.enter_context(RolloutClient(fleet.url))
        until(lambda: all(each.said("has joined") for each in joined) and ready(fleet.url))
        until(lambda: states(client) == ["live", "live"])
        client.push("policy", *adapter(model, 1))
        trained, before = drawn(client, "policy"), {each.id for each in client.fleet()}
        command = [sys.executable, "-m", "rollout_server", "fleet", "restart", "--url", fleet.url]
        restarting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        while restarting.poll() is None:
            assert drawn(client, "policy") == trained
            assert "live" in states(client)
        told = restarting.communicate()[0]
        assert restarting.returncode == 0 and all(f"{id} is live again" in told for id in before)
        found = {each.id: (each.state, each.restarts, each.versions_staged) for each in client.fleet()}
        assert found == dict.fromkeys(before, ("live", 1, 1))
        assert all(each.process.poll() is None for each in joined), "each has replaced itself"


@pytest.mark.long
def test_a_server_that_is_no_controller_takes_no_replica(model: Path) -> None:
    with server_here(model) as server, replica(model, server.url) as lost:
        lost.wait_for("takes no replicas .*start it with serve --fleet")
        assert lost.process.wait(60) != 0
