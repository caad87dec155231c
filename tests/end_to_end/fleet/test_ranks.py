"""`serve --tensor-parallel`: what cannot be served so ends with a sentence, and ranks of `mlx.launch` serve as one."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.live_server import START_S, live_server
from trainer_client import RolloutClient

pytestmark = pytest.mark.timeout(900)


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rollout_server", "serve", "--port", "0", "--tensor-parallel", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_S, stdin=subprocess.DEVNULL)


def test_a_file_of_hosts_with_an_error_ends_the_command_before_anything_is_started(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "one", "ips": ["10.0.0.1"]}]))
    ended = serve("--hostfile", str(hosts))
    assert ended.returncode == 1 and "names 1 hosts, and --tensor-parallel asks for 2 ranks" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.long
def test_a_family_that_cannot_be_cut_ends_the_command_by_name(tmp_path: Path) -> None:
    model = tiny_models.build("gemma3", tmp_path / "gemma3")
    ended = serve("--model", str(model))
    assert ended.returncode == 1 and "cannot serve a gemma3" in ended.stderr + ended.stdout


@pytest.mark.long
def test_ranks_that_mlx_launch_starts_serve_as_one(tmp_path: Path) -> None:
    """Both are of this machine, which a file of hosts names twice."""
    hosts, here = tmp_path / "hosts.json", {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    hosts.write_text(json.dumps([here, here]))
    model = tiny_models.build("qwen3", tmp_path / "qwen3")
    options = ("--kv-memory", "64MiB", "--context-length", "200")
    rows = []
    for ranks in ((), ("--tensor-parallel", "2", "--hostfile", str(hosts))):
        with live_server(model, *options, *ranks) as server, RolloutClient(server.url) as client:
            batch = client.rollouts([[1, 2, 3], [4, 5]], n=2, seed=7, max_tokens=12)
            rows.append([row.token_ids.tolist() for row in batch])
            assert server.stop() == 0
            # Whatever served has ended, and not only the command that started it.
            with socket.socket() as asking:
                assert asking.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2]))) == errno.ECONNREFUSED
            assert not any("KeyboardInterrupt" in line or "Traceback" in line for line in server.log)
    assert rows[0] == rows[1]
