"""Two models in one process that are pushed to in turns, a policy and a reward model: no version stays behind."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.load import load as load_model
from tests.support import tiny_models, tiny_scorers
from tests.support.live_server import live_server
from trainer_client import RolloutClient

PUSHES, KEPT, KINDS, EVERY, FEW = 200, 3, 2, 5, 4
"""Pushes to each name, versions kept of it, LoRA and DoRA in turns, pushes from one batch to the
next, and bundles that may have come to more: a status is as old as a turn, in which a version may be staged or go."""

PERIOD = KINDS * EVERY
"""Pushes after which versions of the same kinds are resident and a batch was as long ago."""

PROMPTS = [[5, 6, 7, 9, 8], [11, 12]]


def contents_of(tensors: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """Never twice the same, since equal contents share their memory."""
    return {name: array * np.float32(1 + number / PUSHES) for name, array in tensors.items()}


def memory_in_use(http: httpx.Client) -> float:
    """Bytes of MLX's arrays in the server's process, as its metrics say."""
    families = text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
    samples = [each for family in families if family.name == "rollout_memory_bytes" for each in family.samples]
    return max(each.value for each in samples if each.labels["part"] == "active")


@pytest.mark.long
def test_pushes_to_both_leave_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing but its server's work changes."""
    base = tiny_models.build("qwen3", tmp_path / "base")
    judge = tiny_models.build("llama", tmp_path / "judge")
    layers, info = tiny_models.linear_layers(base), load_model(EngineOptions(str(judge), "judge")).info
    policies = [tiny_models.random_adapter(layers, 16, seed, dora=seed % 2 == 1) for seed in range(KINDS)]
    rewards = [tiny_scorers.reward_adapter(info, seed, rank=16) for seed in range(KINDS)]
    options = ("--also", f"other={judge}", "--keep-versions", str(KEPT))
    held = []
    with (
        live_server(base, *options) as server,
        RolloutClient(server.url) as client,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        for number in range(1, PUSHES + 1):
            (judge_tensors, judge_config), (tensors, config) = rewards[number % KINDS], policies[number % KINDS]
            judged = client.push("other/judge", contents_of(judge_tensors, number), judge_config)
            pushed = client.push("p", contents_of(tensors, number), config)
            assert judged.version == pushed.version == number
            if number % EVERY == 0:
                batch = client.rollouts(PROMPTS, policy=pushed, reward="other/judge", n=2, max_tokens=4)
                assert {row.reward.version.version for row in batch if row.reward and row.reward.version} == {number}
            for path in ("/reset_prefix_cache", "/v1/release"):
                http.post(path).raise_for_status()
            held.append(memory_in_use(http))
        assert len(client.policy("p").versions) == len(client.policy("other/judge").versions) == KEPT
    # Versions that stay behind, under either name, would leave a bundle each time.
    bundle, settled = sum(array.nbytes for array in rewards[0][0].values()), held[PUSHES // 2 :: PERIOD]
    assert settled[-1] - settled[0] < FEW * bundle, settled
