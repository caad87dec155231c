"""`bench`: its counts are the server's; what it publishes it takes away again. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from rollout_server.cli import app
from rollout_server.commands.bench import numbers
from tests.support.live_server import Server

SMALL = ["--prompt-tokens", "6", "--max-tokens", "5"]


def bench(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["bench", *SMALL, *arguments], env={"COLUMNS": "200", **environment})


def tokens(url: str) -> int:
    return int(httpx.get(f"{url}/health", trust_env=False).json()["tokens"])


def test_a_running_server(server: Server, model: Path, adapter: Path) -> None:
    policies, before = httpx.get(f"{server.url}/v1/weights", trust_env=False).json()["policies"], tokens(server.url)
    done = bench("--clients", "1,3", "--adapter", str(adapter), "--pushes", "2", "--url", server.url, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    # To warm up a request of each client, then two rounds of streams and two of rollouts.
    assert tokens(server.url) - before == (1 + 3) * 5 * 5
    assert [level["clients"] for level in result["levels"]] == [1, 3]
    for level in result["levels"]:
        assert 0 < level["first_token_p50_s"] <= level["latency_p50_s"] <= level["latency_p95_s"]
        assert level["tokens_per_s"] == pytest.approx(5 * level["requests_per_s"])
    assert (result["model"], result["push"]["count"]) == (model.name, 2)
    # A content that is resident already takes no staging.
    assert result["push"]["p50_ms"] >= result["push"]["server_ms"]["stage"] >= 0
    assert httpx.get(f"{server.url}/v1/weights", trust_env=False).json()["policies"] == policies
    assert "3 clients: " in done.stderr and "pushes: " in done.stderr

    refused = bench("--policy", "nobody", "--url", server.url)
    assert refused.exit_code == 1 and "There is no policy 'nobody'" in refused.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_server_started_for_it(model: Path) -> None:
    elsewhere = {"ROLLOUT_ADMIN_KEY": "key", "ROLLOUT_PORT": "9", "ROLLOUT_KV_MEMORY": "64MiB"}
    done = bench("--clients", "2", "--rounds", "1", "--model", str(model), **elsewhere)
    assert done.exit_code == 0, done.output
    title, heads, row = done.stdout.splitlines()
    assert title.strip() == "tiny (float32), 6 + 5 tokens a row"
    assert heads.split()[:2] == ["clients", "tok/s"] and row.split()[0] == "2"


def test_clients_are_numbers() -> None:
    assert numbers("1,8, 32") == [1, 8, 32]
    for text in ("", "0", "1,,2", "1,-2", "x"):
        with pytest.raises(ValueError, match="--clients is"):
            numbers(text)
