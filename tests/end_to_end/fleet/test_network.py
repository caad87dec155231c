"""A replica in a network of its own, whose cable is pulled: what a machine that drops off is, on one machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import tiny_models
from tests.support.fleet.machines import controller, replica
from tests.support.live_server import START_S, until
from trainer_client import RolloutClient

pytestmark = pytest.mark.long

PAIR, NEAR, FAR = "rollouts", "10.213.77.1", "10.213.77.2"
SILENT = ("ROLLOUT_REPLICA_TIMEOUT_S", "10")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def cable() -> Iterator[str]:
    """A network namespace and a pair of interfaces between it and this one."""
    space, near, far = f"{PAIR}-{os.getpid()}", f"ra{os.getpid() % 10**8}", f"rb{os.getpid() % 10**8}"
    try:
        ip("netns", "add", space)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces cannot be made here")
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        ip("addr", "add", f"{NEAR}/24", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", space, "addr", "add", f"{FAR}/24", "dev", far)
        ip("-n", space, "link", "set", far, "up")
        ip("-n", space, "link", "set", "lo", "up")
        yield near
    finally:
        subprocess.run(["ip", "link", "del", near], check=False, capture_output=True)
        ip("netns", "del", space)


def drawn(client: RolloutClient, **more: Any) -> list[list[int]]:
    options: dict[str, Any] = {"policy": "policy", "n": 8, "max_tokens": 300, "seed": 3, "temperature": 1.0} | more
    batch = client.rollouts([[5, 9, 33], [44], list(range(1, 40))], ignore_eos=True, **options)
    return [list(row.token_ids) for row in batch.rollouts]


def test_a_machine_that_drops_off_loses_nobody_a_row(
    cable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*SILENT)
    model = tiny_models.build("qwen3", tmp_path / "tiny")
    options = ("--host", NEAR, "--insecure")
    with controller(model, tmp_path / "state", *options) as fleet:
        space = f"{PAIR}-{os.getpid()}"
        beyond = ("ip", "netns", "exec", space)
        with (
            replica(model, fleet.url, within=beyond) as far,
            replica(model, fleet.url) as near,
            RolloutClient(fleet.url) as client,
        ):
            until(lambda: far.said("has joined") and near.said("has joined"), START_S)
            until(lambda: httpx.get(f"{fleet.url}/ready", timeout=60).status_code == 200)
            until(lambda: [each.state for each in client.fleet()] == ["live", "live"])
            layers = tiny_models.linear_layers(model)
            client.push("policy", *tiny_models.random_adapter(layers, 4, 1))
            expected = drawn(client)
            ip("link", "set", cable, "down")
            assert drawn(client) == expected, "half of the rows were beyond the cable"
            until(lambda: sorted(each.state for each in client.fleet()) == ["dead", "live"])
            assert client.push("policy", *tiny_models.random_adapter(layers, 4, 2)).version == 2
            ip("link", "set", cable, "up")
            until(lambda: [each.state for each in client.fleet()] == ["live", "live"])
            assert [each.versions_staged for each in client.fleet()] == [2, 2]
            assert drawn(client, policy="policy@1") == expected
