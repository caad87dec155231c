"""A trainer that pushes its policy and its reward model in turns, for as long as it likes: nothing is left of what is
kept no longer, on the device or on the host."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
import pytest

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.model.load import load as load_model
from tests.support import tiny_models, tiny_scorers
from tests.support.live_server import LiveServer, live_server, until
from trainer_client import RolloutClient

KEPT, RANK, FEW = 2, 64, 4
MANY, SELDOM = 100, 8
"""Turns after which the host tells of a bundle that was left in one of so many."""
PROMPTS = [[5, 6, 7, 9, 8], list(range(10, 110))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def info(model: Path) -> ModelInfo:
    return load_model(EngineOptions(str(model), "tiny")).info


@pytest.fixture
def live(model: Path) -> Iterator[LiveServer]:
    with live_server(model, "--max-batch", "8", "--keep-versions", str(KEPT)) as server:
        yield server


def host_bytes(live: LiveServer) -> int:
    command = ["ps", "-o", "rss=", "-p", str(live.process.pid)]
    return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def device_bytes(http: httpx.Client) -> dict[str, float]:
    """What the metrics say of versions, and of everything."""
    text = http.get("/metrics").raise_for_status().text
    names = {"slots": r"rollout_slot_bytes(?:{[^}]*})?", "active": r'rollout_memory_bytes{[^}]*part="active"[^}]*}'}
    return {key: sum(map(float, re.findall(rf"^{name} (\S+)$", text, re.M))) for key, name in names.items()}


def kept(http: httpx.Client) -> dict[str, list[tuple[int, int]]]:
    """(Number, rows in use) of every version of every name."""
    policies = http.get("/v1/weights").raise_for_status().json()["policies"]
    return {line["name"]: [(each["version"], each["rows_in_use"]) for each in line["versions"]] for line in policies}


@pytest.mark.timeout(3000)
@pytest.mark.long
@pytest.mark.parametrize("pushes", [30, 1000])
def test_pushes_of_a_policy_and_of_its_reward_in_turns_leave_nothing_behind(
    pushes: int, live: LiveServer, info: ModelInfo
) -> None:
    sizes, host = [], []
    with RolloutClient(live.url) as client, httpx.Client(base_url=live.url, trust_env=False) as http:
        for turn in range(pushes // 2):
            weights, config = tiny_models.random_adapter(info.layers, RANK, turn)
            client.push("rm", *tiny_scorers.reward_adapter(info, turn, rank=RANK))
            policy = client.push("policy", weights, config)
            batch = client.rollouts(PROMPTS, policy=policy, reward="rm", n=2, max_tokens=4, seed=turn)
            assert batch.rewards is not None and {row.reward.version.version for row in batch} == {turn + 1}
            until(lambda: {use for line in kept(http).values() for _, use in line} == {0})
            sizes.append(device_bytes(http))
            host.append(host_bytes(live))
        newest = [(number, 0) for number in range(pushes // 2 - KEPT + 1, pushes // 2 + 1)]
        assert kept(http) == {"rm": newest, "policy": newest}
    # Whatever is made once has been made after a fifth of the pushes. Rows differ in their KV by less than a few
    # bundles; either name alone would have left a bundle for each turn since.
    settled, bundle = pushes // 10, sum(array.nbytes for array in weights.values())
    turns = pushes // 2 - settled
    assert turns >= 3 * FEW
    assert len({size["slots"] for size in sizes[settled:]}) == 1
    assert sizes[-1]["active"] - sizes[settled]["active"] < FEW * bundle, sizes
    # An allocator keeps some of what it is given back, now more and now less: only many pushes tell on the host, and
    # there the middle of the first tenth and that of the last, which are nine tenths of the turns apart.
    if turns >= MANY:
        tenth = turns // 10
        first, last = (median(part) for part in (host[settled : settled + tenth], host[-tenth:]))
        assert last - first < bundle * (turns - tenth) / SELDOM, host
