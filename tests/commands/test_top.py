"""`top`: what it shows is what the server's own routes say."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from rollout_server.cli import app
from rollout_server.commands.top import State, counted, view
from tests.support import tiny_models
from tests.support.live_server import Server
from trainer_client import KeptVersion, PolicyLine, RolloutClient


@pytest.fixture(scope="module", autouse=True)
def pushed(server: Server, model: Path) -> None:
    with RolloutClient(server.url) as client:
        for seed in (1, 2):
            client.push("p", *tiny_models.random_adapter(tiny_models.linear_layers(model), 4, seed))


def top(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["top", "--interval", "0.1", *arguments], env={"COLUMNS": "200"})


def line_of(policy: str, said: dict[str, Any]) -> dict[str, Any]:
    """Of a policy, beside those that other tests of this room push to the same server."""
    (line,) = [line for line in said["policies"] if line["name"] == policy]
    return line


def test_a_state_as_json(server: Server) -> None:
    running = threading.Thread(
        target=httpx.post,
        args=(f"{server.url}/v1/completions",),
        kwargs={
            "headers": {"x-request-id": "watched"},
            "json": {"model": "p", "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "n": 4},
            "trust_env": False,
            "timeout": 60,
        },
    )
    running.start()
    try:
        said = {"running": 0, "steps_per_s": 0.0, "tokens_per_s": 0.0}
        # Metrics are read before the state: rows may run that had not made a step by then.
        while not (said["running"] == 4 and said["tokens_per_s"] > said["steps_per_s"] > 0) and running.is_alive():
            said = json.loads(top("--json", "--url", server.url).stdout)
        assert said["running"] == 4 and said["tokens_per_s"] > said["steps_per_s"] > 0
        assert line_of("p", said)["rows_in_use"] == 4
    finally:
        httpx.post(f"{server.url}/v1/abort", json={"ids": ["watched"]}, trust_env=False).raise_for_status()
        running.join()
    idle = json.loads(top("--json", "--url", server.url).stdout)
    assert (idle["running"], idle["waiting"], idle["tokens_per_s"], idle["state"]) == (0, 0, 0.0, "ready")
    assert idle["tokens"] == httpx.get(f"{server.url}/health", trust_env=False).json()["tokens"]
    policy = line_of("p", idle)
    assert (policy["live"], policy["versions"]) == (2, [1, 2]) and policy["bytes"] > 0


def test_once_and_a_line_for_each_look(server: Server) -> None:
    shown = top("--once", "--url", server.url).stdout.splitlines()
    assert shown[0] == f"{server.url}: ready" and shown[1].startswith("0 tok/s, ")
    assert ["p", "2", "1,", "2"] in [line.split()[:4] for line in shown]
    command = [sys.executable, "-m", "rollout_server", "top", "--interval", "0.1", "--url", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(3)]
        watching.terminate()
    assert all(" tok/s, 0 running, 0 waiting, KV " in line for line in lines), lines
    assert all("p@2" in line.rstrip().partition(" live: ")[2].split(", ") for line in lines), lines


def test_no_server_is_one_sentence() -> None:
    refused = top("--url", "http://127.0.0.1:9")
    assert refused.exit_code == 1 and refused.stderr.startswith("rollout-server: No rollout server answers")


def test_memory_of_keys_and_values_where_the_server_tells() -> None:
    text = (
        "# TYPE rollout_memory_bytes gauge\n"
        'rollout_memory_bytes{part="kv_held"} 1048576.0\nrollout_memory_bytes{part="kv_limit"} 4194304.0\n'
        "# TYPE rollout_tokens_total counter\nrollout_tokens_total 30.0\n"
    )
    health = {"state": "ready", "paused": "keep", "running": 1, "waiting": 2, "tokens": 30}
    kept = KeptVersion(version=7, digest="sha256:0", live=True, nbytes=2**20)
    line = PolicyLine(name="p", live=7, versions=(kept,))
    state = State("http://here", health, (line,), {("rollout_tokens_total", ""): 10.0}, counted(text), 2.0)
    assert state.as_json()["tokens_per_s"] == 10.0
    assert (state.as_json()["kv_bytes"], state.as_json()["kv_limit_bytes"]) == (2**20, 2**22)
    console = Console(width=100, record=True, file=StringIO())
    console.print(view(state))
    assert "paused (keep)" in (shown := console.export_text()) and "KV 1 of 4 MiB" in shown
