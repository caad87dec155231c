"""Replicas that join a controller, as on machines of their own: let in, refused by name, lost, and adopted again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import tiny_models
from tests.support.fleet.machines import controller, machine, replica
from tests.support.live_server import until
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
