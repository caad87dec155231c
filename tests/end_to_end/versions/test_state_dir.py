"""`--state-dir` through real processes that are killed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from rollout_server.errors import InvalidField
from tests.support import kill_nine, tiny_models
from tests.support.live_server import server_here
from trainer_client import RolloutClient


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("durable") / "tiny")


@pytest.mark.long
def test_killed_at_random_moments_it_serves_what_it_acknowledged(model: Path, tmp_path: Path) -> None:
    trainer = kill_nine.run(model, tmp_path / "state", kills=6)
    assert trainer.pushes >= 3, "kills came while it was pushing"


@pytest.mark.long
def test_a_fleet_s_controller_killed_where_a_record_was_written_serves_what_it_acknowledged(
    model: Path, tmp_path: Path
) -> None:
    """Its replicas end with it; a record is written before aliases move."""
    trainer = kill_nine.run(model, tmp_path / "state", kills=3, replicas=2)
    assert trainer.pushes >= 1, "kills came while it was pushing"


@pytest.mark.long
def test_pushes_leave_no_file_behind(model: Path, tmp_path: Path) -> None:
    """Of 24 pushes with three kept, rows decoding meanwhile, the directory holds three files of weights."""
    state, layers = tmp_path / "state", tiny_models.linear_layers(model)
    counts = []
    with server_here(model, state_dir=state, keep_versions=3) as live, RolloutClient(live.url) as client:
        for step in range(24):
            client.push("p", *tiny_models.random_adapter(layers, 4, step, dora=step % 2 == 1))
            client.rollouts([[5, 9, 33]], policy="p", max_tokens=3)
            counts.append(sum(path.is_file() for path in state.rglob("*")))
        metrics = httpx.get(f"{live.url}/metrics").text
    assert set(counts[4:]) == {3 + 3}, "weights, and lock, state.json and the record of the name"
    for phase in ("receive", "validate", "stage", "activate", "persist"):
        assert f'rollout_push_seconds_count{{model="base",phase="{phase}"}} 24.0' in metrics


def test_a_base_that_is_another_one_is_refused_with_a_sentence(model: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with server_here(model, state_dir=state) as live, RolloutClient(live.url) as client:
        client.push("p", *tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 1))
    other = tiny_models.build("qwen3", tmp_path / "other", seed=5)
    said = r"made for the base sha256:\w+, and this base is sha256:\w+"
    with pytest.raises(InvalidField, match=said), server_here(other, state_dir=state):
        pass
