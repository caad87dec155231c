"""Pictures where the model that sees is not the only one, or not in the server's process: beside another model, scored
by a version of it in the call, and in a fleet of two."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.load import load
from tests.support import tiny_models, tiny_scorers
from tests.support.golden_vision import copied
from tests.support.live_server import live_server, server_here
from tests.support.numbers.bounds import assert_near
from tests.support.pictures.files import drawn, saved
from tests.support.pictures.seeing import MOST
from trainer_client import RolloutClient
from trainer_client.errors import InvalidField

FAMILY = "qwen2_5_vl"


def shown(seed: int) -> list[dict[str, Any]]:
    url = f"data:image/png;base64,{base64.b64encode(saved(drawn(40, 24, seed=seed))).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]}]


PROMPTS = [shown(7), shown(8), [{"role": "user", "content": "hello"}]]
ASKED: dict[str, Any] = {"n": 2, "max_tokens": 8, "seed": 2, "ignore_eos": True}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(FAMILY, tmp_path_factory.mktemp("seeing") / FAMILY)


@pytest.fixture(scope="module")
def alone(seeing: Path) -> list[tuple[list[int], np.ndarray]]:
    """Ids and log-probabilities of a server that has this model and no other, in its own process as beside another:
    replicas would be given prompts one by one, in batches of another shape."""
    with server_here(seeing, tensor_parallel=None, replicas=1) as server, RolloutClient(server.url) as client:
        return [(row.token_ids.tolist(), row.logprobs) for row in client.rollouts(PROMPTS, **ASKED)]


@pytest.fixture(scope="module")
def beside(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutClient]:
    """A model that reads text alone, with the one that sees beside it."""
    text = tiny_models.build("qwen3", tmp_path_factory.mktemp("text") / "text")
    with server_here(text, also=(("eye", str(seeing)),)) as server, RolloutClient(server.url) as client:
        yield client


def test_beside_another_model_it_sees_as_alone(
    beside: RolloutClient, alone: list[tuple[list[int], np.ndarray]]
) -> None:
    batch = beside.rollouts(PROMPTS, policy="eye", **ASKED)
    for row, (ids, logprobs) in zip(batch, alone, strict=True):
        assert row.token_ids.tolist() == ids and (row.logprobs == logprobs).all()
    assert all(row.exact for row in beside.replay(batch))
    assert_near(beside.logprobs(batch, policy="eye").logprobs, batch.logprobs, MOST)
    with pytest.raises(InvalidField, match="no pictures"):
        beside.rollouts(PROMPTS, policy="base", **ASKED)


def test_a_reward_version_sees_the_pictures_of_the_rows_that_it_scores(beside: RolloutClient, seeing: Path) -> None:
    info = load(EngineOptions(str(seeing), FAMILY)).info
    head = np.random.default_rng(9).standard_normal((1, info.embedding.width)).astype(np.float32)
    beside.push("judge", *tiny_scorers.reward_adapter(info, 3, head={"score.weight": head}), model="eye")
    for way in ("messages", "token_ids"):
        batch = beside.rollouts(PROMPTS, policy="eye", reward={"model": "eye/judge", "as": way}, **ASKED)
        assert np.isfinite(batch.rewards).all()
    asked = beside.rewards(batch, model="eye/judge")
    assert_near(batch.rewards, asked.values, MOST)
    # As many placeholders, another picture.
    first, other = batch.sequences[0], batch.sequences[2]
    (turned,) = beside.rewards([{"token_ids": first["token_ids"], "images": other["images"]}], model="eye/judge").values
    assert abs(turned - batch.rewards[0]) > 100 * MOST


@pytest.mark.long  # Three processes.
def test_a_fleet_of_two_sees_as_one_does(seeing: Path, alone: list[tuple[list[int], np.ndarray]]) -> None:
    with live_server(seeing, "--replicas", "2") as server, RolloutClient(server.url) as client:
        batch = client.rollouts(PROMPTS, **ASKED)
        for row, (ids, logprobs) in zip(batch, alone, strict=True):
            assert row.token_ids.tolist() == ids
            assert_near(row.logprobs, logprobs, MOST)
        assert all(row.exact for row in client.replay(batch))
        assert_near(client.logprobs(batch).logprobs, batch.logprobs, MOST)
        assert all(card["vision"] for card in httpx.get(f"{server.url}/v1/models").json()["data"])
        assert server.stop() == 0
