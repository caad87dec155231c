"""Two models in one process that are pushed to in turns, a policy and a reward model: no version stays behind."""

from __future__ import annotations

from pathlib import Path

import httpx
import mlx.core as mx
import pytest

from rollout_server.config import ServerConfig
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.load import load as load_model
from rollout_server.http.server import served
from tests.support import tiny_models, tiny_scorers
from trainer_client import RolloutClient

KEPT, KINDS, FEW = 3, 6, 4
PROMPTS = [[5, 6, 7, 9, 8], [11, 12]]


@pytest.mark.long
@pytest.mark.parametrize("count", [60, 400])
def test_pushes_to_both_leave_nothing_behind(count: int, tmp_path: Path) -> None:
    base = tiny_models.build("qwen3", tmp_path / "base")
    judge = tiny_models.build("llama", tmp_path / "judge")
    layers, info = tiny_models.linear_layers(base), load_model(EngineOptions(str(judge), "judge")).info
    policies = [tiny_models.random_adapter(layers, 16, seed, dora=seed % 2 == 1) for seed in range(KINDS)]
    rewards = [tiny_scorers.reward_adapter(info, seed, rank=16) for seed in range(KINDS)]
    config = ServerConfig(model=str(base), also=(("other", str(judge)),), port=0, keep_versions=KEPT)
    held = []
    with served(config) as url, RolloutClient(url) as client, httpx.Client(base_url=url, trust_env=False) as http:
        for number in range(1, count // 2 + 1):
            judged = client.push("other/judge", *rewards[number % KINDS])
            pushed = client.push("p", *policies[number % KINDS])
            assert judged.version == pushed.version == number
            if number % 5 == 0:
                batch = client.rollouts(PROMPTS, policy=pushed, reward="other/judge", n=2, max_tokens=4)
                assert {row.reward.version.version for row in batch if row.reward and row.reward.version} == {number}
            for path in ("/reset_prefix_cache", "/v1/release"):
                http.post(path).raise_for_status()
            held.append(mx.get_active_memory())
        assert len(client.policy("p").versions) == len(client.policy("other/judge").versions) == KEPT
    # The contents come again every six pushes, so that memory does too; either name alone would have left a bundle for
    # each round since.
    settled, bundle = held[len(held) // 5 :], sum(array.nbytes for array in rewards[0][0].values())
    assert len(settled) >= 5 * FEW
    assert max(settled) - min(settled) < FEW * bundle, settled
