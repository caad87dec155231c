"""Pin, delete and export through a real process: what the client and the command line say of versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from rollout_server.cli import app
from tests.support import tiny_models
from tests.support.live_server import Server, assert_drawn_again, server_here
from trainer_client import RolloutClient
from trainer_client.errors import Conflict, UnknownPolicy, VersionGone

PROMPTS = [[5, 9, 33], [44]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("live") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with server_here(model, keep_versions=2) as live:
        yield live


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url) as client:
        yield client


def adapter(model: Path, seed: int) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    return tiny_models.random_adapter(tiny_models.linear_layers(model), 4, seed)


def test_pin_export_delete_and_push_back(client: RolloutClient, model: Path, tmp_path: Path) -> None:
    first = client.push("p", *adapter(model, 1))
    assert 1 < first.report["effective_rank"] <= 4 and first.report["bytes"] == first.nbytes
    assert first.report["delta_norm"] > first.report["largest_modules"][0]["delta_norm"] > 0
    before = client.rollouts(PROMPTS, policy="p", max_tokens=8, seed=1)
    assert client.pin("p", 1).pinned
    for seed in (2, 3, 4):
        client.push("p", *adapter(model, seed))
    assert [(v.version, v.pinned) for v in client.policy("p").versions] == [(1, True), (3, False), (4, False)]
    for format in ("peft", "mlx"):
        exported = client.export("p", 1, format=format)  # type: ignore[arg-type]
        assert exported.digest == first.digest
        again = client.push(f"{format}-copy", exported.save(tmp_path / format))
        assert again.digest == first.digest and again.verified
        assert_drawn_again(client.rollouts(PROMPTS, policy=f"{format}-copy", max_tokens=8, seed=1), before)
    with pytest.raises(Conflict, match="live"):
        client.delete("p", 4)
    assert client.delete("p", 1).versions == (1,)
    for call in (client.export, client.pin, client.delete, client.activate):
        with pytest.raises(VersionGone):
            call("p", 1)
    assert client.delete_policy("p").versions == (3, 4)
    with pytest.raises(UnknownPolicy):
        client.rollouts(PROMPTS, policy="p", max_tokens=1)
    assert client.push("p", *adapter(model, 1)).version == 5


def test_the_command_line_exports_and_deletes(
    server: Server, client: RolloutClient, model: Path, tmp_path: Path
) -> None:
    pushed = [client.push("cli", *adapter(model, seed)) for seed in (1, 2)]

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["weights", *arguments, "--url", server.url])
        assert done.exit_code == 0, done.output
        return done.stdout

    out = tmp_path / "out"
    assert run("export", "cli", "1", str(out)) == f"{out} holds cli@1: {pushed[0].digest}\n"
    assert client.push("from-cli", out).digest == pushed[0].digest
    said = json.loads(run("export", "cli", "2", str(out), "--format", "mlx", "--json"))
    assert said["digest"] == pushed[1].digest and (out / "adapters.safetensors").stat().st_size == said["bytes"]
    assert run("delete", "cli", "1") == "deleted cli@1\n"
    assert run("delete", "cli", "--all") == "deleted cli@2\n"
    wrong = CliRunner().invoke(app, ["weights", "delete", "cli", "--url", server.url])
    assert wrong.exit_code == 1 and "--all" in wrong.stderr


def test_metrics_count_what_happened(server: Server, client: RolloutClient, model: Path) -> None:
    def read() -> dict[str, float]:
        lines = httpx.get(f"{server.url}/metrics").raise_for_status().text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = read()
    pushed = client.push("counted", *adapter(model, 1))
    batch = client.rollouts(PROMPTS, policy="counted", n=2, max_tokens=6, ignore_eos=True)
    after = read()
    assert (
        after['rollout_tokens_total{model="base"}'] - before['rollout_tokens_total{model="base"}']
        == len(batch.token_ids)
        == 24
    )
    assert after['rollout_steps_total{model="base"}'] > before['rollout_steps_total{model="base"}']
    assert after['rollout_weights_bytes{model="base",policy="counted"}'] == pushed.nbytes
    assert after['rollout_slot_bytes{model="base"}'] >= (pushed.nbytes or 0)
    pushes = 'rollout_push_seconds_count{model="base",phase="activate"}'
    assert after[pushes] - before.get(pushes, 0) == 1
    asked = 'rollout_request_seconds_count{method="POST",route="/v1/rollouts",status="200"}'
    assert after[asked] - before.get(asked, 0) == 1
