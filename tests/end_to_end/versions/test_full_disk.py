"""A state directory on a disk that is full, as a disk and not as a double of one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.demo.run import model_directory
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server
from trainer_client import Retry, RolloutClient, TrainerClientError

pytestmark = pytest.mark.long  # Two or three servers each, which are killed.
PAGE = os.sysconf("SC_PAGE_SIZE")
PUSHES, WEIGHTS, OTHERS = 2, 56_000, 7
"""What fits on the disk: so many versions, the bytes of one at most, and pages of the reserve, of the base's record and
of a name's with the one that takes its place."""
PAGES = PUSHES * -(-WEIGHTS // PAGE) + OTHERS


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of 140 kB, where a page has 4 kB: a file takes whole pages."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={PAGES * PAGE}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> None:
    """To the last block."""
    with (disk / "other").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


def push_until_full(client: RolloutClient) -> int:
    layers = tiny_models.linear_layers(model_directory())
    for seed in range(1, 20):
        try:
            client.push("p", *tiny_models.random_adapter(layers, 1, seed), activate=seed == 1)
        except TrainerClientError as error:
            assert "No space left" in str(error)
            return seed - 1
    raise AssertionError("the disk never was full")


def kept(client: RolloutClient) -> list[int]:
    return [version.version for line in client.weights() if line.name == "p" for version in line.versions]


def client_of(server: LiveServer) -> RolloutClient:
    return RolloutClient(server.url, retry=Retry(attempts=1))


def test_what_frees_room_needs_none(disk: Path) -> None:
    state = disk / "state"
    with live_server(None, "--state-dir", str(state)) as server, client_of(server) as client:
        pushed = push_until_full(client)
        assert pushed >= PUSHES
        fill(disk)
        client.pin("p", 2)
        client.pin("p", 2, pinned=False)
        client.activate("p", 2)
        client.delete("p", 1)
        assert kept(client) == list(range(2, pushed + 1))
        server.process.kill()
    with live_server(None, "--state-dir", str(state)) as server, client_of(server) as client:
        assert kept(client) == list(range(2, pushed + 1)) and client.policy("p").live == 2
        fill(disk)
        client.delete_policy("p")
        assert kept(client) == []
        (disk / "other").unlink()
        client.push("p", *tiny_models.random_adapter(tiny_models.linear_layers(model_directory()), 1, 50))
        assert kept(client) == [pushed + 1]


def test_a_directory_without_a_reserve_on_a_disk_that_is_full(disk: Path) -> None:
    """As an earlier version left it."""
    state = disk / "state"
    with live_server(None, "--state-dir", str(state)) as server, client_of(server) as client:
        push_until_full(client)
        assert server.stop() == 0
    (state / "lock").write_bytes(b"")
    fill(disk)
    with live_server(None, "--state-dir", str(state)) as server, client_of(server) as client:
        client.delete("p", 2)
        assert 2 not in kept(client)
        server.process.kill()
    with live_server(None, "--state-dir", str(state)) as server, client_of(server) as client:
        assert 1 in kept(client) and 2 not in kept(client)
        assert "lost" not in "".join(server.log)
