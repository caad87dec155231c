"""`serve --tensor-parallel`: what cannot be served so ends with a sentence, and ranks of `mlx.launch` serve as one."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from rollout_server.fleet.replica.engine import AGAIN
from tests.support import tiny_models, tiny_scorers
from tests.support.live_server import START_S, Server, live_server
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutClient

pytestmark = pytest.mark.timeout(900)


def serve(*options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rollout_server", "serve", "--port", "0", "--tensor-parallel", str(ranks)]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=START_S, stdin=subprocess.DEVNULL
    )


def assert_refused(ended: subprocess.CompletedProcess[str], sentence: str) -> None:
    """With the status of an error, and with the sentence as the last thing that is said."""
    assert ended.returncode == 1, ended.stderr
    assert sentence in ended.stderr.splitlines()[-1], ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_file_of_hosts_with_an_error_ends_the_command_before_anything_is_started(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([{"ssh": "one", "ips": ["10.0.0.1"]}]))
    ended = serve("--hostfile", str(hosts))
    assert_refused(ended, "names 1 hosts, and --tensor-parallel asks for 2 ranks")


UNCUT = (
    ("gemma2", 2, "--tensor-parallel 2 cannot serve a gemma2 model: mlx-lm's class for it has no shard()"),
    ("qwen3", 3, "this qwen3 model: its num_attention_heads is 4, which 3 ranks cannot share out evenly"),
    ("qwen3", 4, "this qwen3 model: its num_key_value_heads is 2, which 4 ranks cannot share out evenly"),
)
"""Each costs the start of all its ranks; tests/engine/ranks/test_cut.py asks without any."""


@pytest.mark.long
@pytest.mark.parametrize(("family", "ranks", "sentence"), UNCUT)
def test_a_model_that_cannot_be_cut_ends_the_command_by_name(
    family: str, ranks: int, sentence: str, tmp_path: Path
) -> None:
    assert_refused(serve("--model", str(tiny_models.build(family, tmp_path / family)), ranks=ranks), sentence)


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


def processes_of(rank: int, model: Path) -> list[int]:
    """Those that are this rank of an engine of the model, as their environment says."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said, command = (folder / "environ").read_bytes().split(b"\0"), (folder / "cmdline").read_bytes()
        except OSError:
            # It has ended meanwhile, or is somebody else's.
            continue
        if f"MLX_RANK={rank}".encode() in said and str(model).encode() in command:
            found.append(int(folder.name))
    return found


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="nothing says which process is which rank")
def test_a_rank_that_mlx_launch_started_and_that_ends_ends_the_server(tmp_path: Path) -> None:
    """Its status has a manager start it again, and nothing is left that listens."""
    hosts, here = tmp_path / "hosts.json", {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    hosts.write_text(json.dumps([here, here]))
    model = tiny_models.build("qwen3", tmp_path / "qwen3")
    options = ("--kv-memory", "64MiB", "--context-length", "200", "--tensor-parallel", "2", "--hostfile", str(hosts))
    with live_server(model, *options) as server:
        ranks = processes_of(1, model)
        assert ranks
        for process in ranks:
            os.kill(process, signal.SIGKILL)
        assert server.process.wait(120) == AGAIN, "".join(server.log)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health")


def pushed(server: Server, name: str, tensors: Mapping[str, Any], config: Any, **options: str) -> httpx.Response:
    files = {"weights": save(dict(tensors)), "config": json.dumps(config).encode()}
    return httpx.post(f"{server.url}/v1/weights", data={"name": name, **options}, files=files, timeout=300)


@pytest.mark.long
def test_two_engines_of_two_ranks_serve_what_one_process_serves_and_refuse_what_is_not_cut(tmp_path: Path) -> None:
    model = tiny_models.build("qwen3", tmp_path / "qwen3", num_hidden_layers=2)
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 1, dora=True)
    whole = {
        name: np.asarray(value) for name, value in load_file(model / "model.safetensors").items() if "norm" in name
    }
    options = ("--kv-memory", "64MiB", "--context-length", "200")
    rows = []
    for engines in ((), ("--replicas", "2", "--min-replicas", "2", "--tensor-parallel", "2")):
        with live_server(model, *options, *engines) as server, RolloutClient(server.url) as client:
            assert client.push("policy", tensors, config).version == 1
            if engines:
                for refused in (
                    pushed(server, "merged", tensors, config, mode="merged"),
                    pushed(server, "whole", whole, {"kind": "full"}),
                ):
                    assert refused.status_code == 422, refused.text
                    assert "not served by several ranks" in refused.json()["error"]["message"]
                assert [replica.state for replica in client.fleet()] == ["live", "live"]
            drawn = [client.rollouts([[1, 2, 3], [4, 5]], policy=policy, n=2, seed=7, max_tokens=12)
                     for policy in ("base", "policy")]  # fmt: skip
            rows.append([row.token_ids.tolist() for batch in drawn for row in batch])
            server.stop()
    assert rows[0] == rows[1] and rows[0][:4] != rows[0][4:]


@pytest.mark.long
def test_a_reward_model_that_is_cut_scores_as_it_does_whole(tmp_path: Path) -> None:
    model = tiny_scorers.build("qwen3", tmp_path, labels=2, id2label={"0": "bad", "1": "good"})
    sequences = [[5, 9, 33], [44], list(range(1, 81))]
    expected = np.stack([tiny_scorers.scores(model, sequence)[-1] for sequence in sequences])
    with live_server(model, "--context-length", "200", "--tensor-parallel", "2") as server:
        asked = {"model": "base", "input": sequences, "task": "classify", "use_activation": False}
        found = httpx.post(f"{server.url}/pooling", json=asked, timeout=300).raise_for_status().json()["data"]
        assert_near([entry["data"] for entry in found], expected, TINY.of_logits(expected, 80))
        server.stop()
