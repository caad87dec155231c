"""The whole way: a reward model pushed over HTTP beside a policy, asked, kept over a restart, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save_file

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.model.load import load as load_model
from tests.support import tiny_models, tiny_scorers
from tests.support.engine.driver import Driver
from tests.support.live_server import server_here
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutClient, ServerError

SEQUENCES = [[5, 6, 7, 9, 8], [9, 9, 4], list(range(10, 90))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def info(model: Path) -> ModelInfo:
    return load_model(EngineOptions(str(model), "tiny")).info


def saved(place: Path, info: ModelInfo, **options: Any) -> Path:
    """A directory as PEFT leaves it."""
    tensors, config = tiny_scorers.reward_adapter(info, **options)
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def expected(model: Path, info: ModelInfo, positions: Any = None, **options: Any) -> list[np.ndarray]:
    driver = Driver.start(model)
    driver.push("rm", tiny_scorers.reward_bundle(info, **options))
    return driver.classify(SEQUENCES, "rm", positions=positions)


def test_from_a_push_to_a_restart(model: Path, info: ModelInfo, tmp_path: Path) -> None:
    state = tmp_path / "state"
    reward, steps = saved(tmp_path / "rm", info), saved(tmp_path / "prm", info, labels=2, task_type="TOKEN_CLS")
    policy = tiny_models.save_adapter(tmp_path / "policy", *tiny_models.random_adapter(info.layers, 4, 9))
    wanted = np.concatenate(expected(model, info))
    with server_here(model, state_dir=state, adapters=[f"prm={steps}"]) as live, RolloutClient(live.url) as client:
        version = client.push("rm", reward)
        client.push("policy", policy)
        found = client.rewards(SEQUENCES, model=version)
        assert_near(found.values, wanted[:, 0], TINY.of_logits(wanted, 80))
        assert (found.version.digest, found.labels, found.tokens.tolist()) == (version.digest, (None,), [5, 3, 80])
        again = client.rewards(SEQUENCES, model="rm@1", activation="model")
        np.testing.assert_allclose(again.values, 1 / (1 + np.exp(-found.values)), rtol=1e-5)
        batch = client.rollouts(SEQUENCES[:2], policy="policy", n=2, max_tokens=4, seed=1)
        assert len(client.rewards(batch, model="rm")) == 4
        of_steps = client.rewards(SEQUENCES, model="prm", steps={"token_id": 9})
        at = [(3,), (0, 1), ()]
        for index, scores in enumerate(
            expected(model, info, [own or (0,) for own in at], labels=2, task_type="TOKEN_CLS")
        ):
            assert of_steps.steps(index).shape == (len(at[index]), 2)
            if at[index]:
                assert_near(of_steps.steps(index), scores, TINY.of_logits(scores, 80))
        with pytest.raises(ServerError, match="rm@1 scores labels"):
            client.rollouts(SEQUENCES[:1], policy="rm", max_tokens=2)
        with pytest.raises(ServerError, match="'policy' does not do this"):
            client.rewards(SEQUENCES, model="policy")
        with pytest.raises(ServerError, match="policy@1 is for the task generate"):
            client.push("policy", reward)
        narrow = tiny_scorers.reward_adapter(info, head={"score.weight": np.zeros((1, 60), np.float32)})
        with pytest.raises(ServerError, match=r"score.weight has shape \[1, 60\]") as refused:
            client.push("narrow", *narrow)
        assert refused.value.status == 422
        exported = httpx.get(f"{live.url}/v1/weights/rm/1/export", params={"format": "peft"}).raise_for_status().content
        assert httpx.get(f"{live.url}/v1/weights/rm/1/export", params={"format": "mlx"}).status_code == 409
    assert "base_model.model.score.weight" in load(exported)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "adapter_model.safetensors").write_bytes(exported)
    with safe_open(tmp_path / "back" / "adapter_model.safetensors", "numpy") as file:
        config = file.metadata()["adapter_config"]
    assert json.loads(config)["task_type"] == "SEQ_CLS"
    (tmp_path / "back" / "adapter_config.json").write_text(config)
    with server_here(model, state_dir=state) as live, RolloutClient(live.url) as client:
        after = client.rewards(SEQUENCES, model="rm")
        # Chunks follow from what reading costs, which each start measures: sums are cut elsewhere.
        assert_near(after.values, found.values, TINY.of_logits(wanted, 80))
        assert after.version == found.version
        assert client.push("rm", tmp_path / "back").unchanged
        cards = {card["id"]: card["task"] for card in httpx.get(f"{live.url}/v1/models").json()["data"]}
        assert (cards["rm"], cards["prm"], cards["policy"]) == ("classify", "token_classify", "generate")


def test_a_server_of_a_reward_model(tmp_path: Path) -> None:
    directory = tiny_scorers.build("qwen3", tmp_path, labels=2, id2label={"0": "bad", "1": "good"})
    scores = [tiny_scorers.scores(directory, row)[-1] for row in SEQUENCES]
    with server_here(directory) as live, RolloutClient(live.url) as client:
        found = client.classify(SEQUENCES)
        for probs, label, raw in zip(found.probs, found.labels, scores, strict=True):
            assert_near(probs, np.exp(raw) / np.exp(raw).sum(), TINY.of_logits(raw, max(map(len, SEQUENCES))))
            assert label == ("bad", "good")[int(np.argmax(raw))]
        for path, body in (
            ("/v1/rollouts", {"policy": "base", "prompts": [{"token_ids": [1]}]}),
            ("/v1/completions", {"model": "base", "prompt": [1]}),
            ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/logprobs", {"policy": "base", "sequences": [{"token_ids": [1, 2]}]}),
        ):
            refused = httpx.post(f"{live.url}{path}", json=body)
            assert refused.status_code == 400, path
            error = refused.json()["error"]
            assert "is served for the task classify" in error["message"]
            assert error["param"] == ("model" if path.startswith("/v1/c") else "policy")
        assert httpx.get(f"{live.url}/health").status_code == 200
