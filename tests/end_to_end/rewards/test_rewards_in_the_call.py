"""The whole way: rollouts with rewards over HTTP, beside pushes of the very model that gives them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rollout_server.engine.messages.options import EngineOptions, ModelInfo
from rollout_server.engine.model.load import load as load_model
from tests.support import tiny_models, tiny_scorers
from tests.support.live_server import Server, rows_ended, server_here, until
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutBatch, RolloutClient, ServerError

PROMPTS = [[5, 6, 7, 9, 8], [9, 9, 4], list(range(10, 110))]
"""The last one is long enough to be read once for all of its rows."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def info(model: Path) -> ModelInfo:
    return load_model(EngineOptions(str(model), "tiny")).info


@pytest.fixture(scope="module")
def live(model: Path) -> Iterator[Server]:
    with server_here(model, max_batch=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: Server, info: ModelInfo) -> Iterator[RolloutClient]:
    with RolloutClient(live.url) as client:
        client.push("rm", *tiny_scorers.reward_adapter(info))
        client.push("labels", *tiny_scorers.reward_adapter(info, 3, labels=3))
        client.push("policy", *tiny_models.random_adapter(info.layers, 4, 9))
        yield client


def within(scores: np.ndarray) -> Any:
    return TINY.of_logits(scores, 160)


def in_use(live: Server) -> dict[str, int]:
    policies = httpx.get(f"{live.url}/v1/weights").json()["policies"]
    return {line["name"]: sum(version["rows_in_use"] for version in line["versions"]) for line in policies}


def test_rewards_are_those_that_are_asked_for_afterwards(client: RolloutClient, live: Server) -> None:
    options: dict[str, Any] = {"policy": "policy", "n": 4, "max_tokens": 24, "seed": 3}
    batch = client.rollouts(PROMPTS, reward="rm", **options)
    afterwards = client.rewards(batch, model="rm")
    assert batch.rewards is not None and batch.rewards.dtype == np.float32
    assert_near(batch.rewards, afterwards.values, within(afterwards.values))
    assert {row.reward.version for row in batch if row.reward} == {afterwards.version}
    plain = client.rollouts(PROMPTS, **options)
    np.testing.assert_array_equal(plain.token_ids, batch.token_ids)
    assert plain.rewards is None
    lines = client.stream_rollouts(PROMPTS, reward="rm", **options)
    streamed = RolloutBatch.of(sorted(lines, key=lambda row: (row.prompt_index, row.sample_index)))
    np.testing.assert_array_equal(streamed.token_ids, batch.token_ids)
    assert streamed.rewards is not None
    assert_near(streamed.rewards, afterwards.values, within(afterwards.values))
    several = client.rollouts(PROMPTS, reward="labels", **options)
    assert several.reward_scores is not None and several.reward_scores.shape == (12, 3)
    wanted = client.rewards(batch, model="labels").scores
    assert_near(several.reward_scores, wanted, within(wanted))
    assert set(in_use(live).values()) == {0}


@pytest.mark.parametrize("reads", ["text", "messages"])
def test_what_is_read_as_text_and_as_messages(client: RolloutClient, reads: str) -> None:
    prompts: list[Any] = ["the cat", "a"]
    if reads == "messages":
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    batch = client.rollouts(prompts, reward={"model": "rm", "as": reads}, n=2, max_tokens=8, seed=1)
    given = [
        {"text": prompts[row.prompt_index] + row.text}
        if reads == "text"
        else {"messages": [*prompts[row.prompt_index], {"role": "assistant", "content": row.text}]}
        for row in batch
    ]
    wanted = client.rewards(given, model="rm").values
    assert batch.rewards is not None
    assert_near(batch.rewards, wanted, within(wanted))


def test_a_push_in_the_middle_changes_nothing_about_a_call(
    client: RolloutClient, live: Server, info: ModelInfo
) -> None:
    """The first rows are there when the model is pushed anew; the last ones begin after it."""
    stream = client.stream_rollouts(PROMPTS, reward="rm", n=8, max_tokens=48, seed=5, policy="policy")
    rows = [next(stream)]
    before = rows[0].reward
    assert before is not None and before.version is not None
    newer = client.push("rm", *tiny_scorers.reward_adapter(info, 77))
    rows += stream
    assert len(rows) == 24
    assert {row.reward.version for row in rows if row.reward} == {before.version}
    assert newer.version == before.version.version + 1
    old = f"rm@{before.version.version}"
    batch = RolloutBatch.of(rows)
    wanted = client.rewards(batch, model=old).values
    assert batch.rewards is not None
    assert_near(batch.rewards, wanted, within(wanted))
    after = client.rollouts(PROMPTS, reward="rm", max_tokens=4, seed=1)
    assert {row.reward.version.digest for row in after if row.reward and row.reward.version} == {newer.digest}
    until(lambda: set(in_use(live).values()) == {0})


def test_who_leaves_or_is_ended_leaves_nothing_behind(client: RolloutClient, live: Server) -> None:
    body: dict[str, Any] = {
        "id": "ended",
        "policy": "base",
        "prompts": [{"token_ids": row} for row in PROMPTS],
        "n": 4,
        "reward": {"model": "rm"},
        "sampling": {"max_tokens": 1500, "ignore_eos": True},
    }
    short = {"token_ids": [3], "max_tokens": 2}
    streamed = {**body, "prompts": [short, *body["prompts"]], "stream": True}
    before = rows_ended(live.url, "aborted")
    with httpx.stream("POST", f"{live.url}/v1/rollouts", json=streamed, timeout=60) as reply:
        first = json.loads(next(reply.iter_lines()))
        assert first["reward"]["value"] is not None
    until(lambda: set(in_use(live).values()) == {0})
    until(lambda: rows_ended(live.url, "aborted") == before + len(PROMPTS) * body["n"])
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(httpx.post(f"{live.url}/v1/rollouts", json=body, timeout=120).json())
    )
    asking.start()
    until(lambda: in_use(live)["rm"] > 0)
    until(lambda: httpx.post(f"{live.url}/v1/abort", json={"ids": ["ended"]}).json()["aborted"])
    asking.join(60)
    rows = found[0].get("rollouts")
    if rows is not None:
        assert {row["reward"]["error"]["code"] for row in rows} == {"not_scored"}
    until(lambda: set(in_use(live).values()) == {0})


def test_a_reward_that_cannot_be_read_costs_no_rollout(client: RolloutClient) -> None:
    options: dict[str, Any] = {"n": 2, "max_tokens": 8, "seed": 1}
    batch = client.rollouts(PROMPTS, reward={"model": "rm", "timeout_s": 1e-6}, **options)
    assert batch.complete and len(batch) == 6
    plain = client.rollouts(PROMPTS, **options)
    assert [list(row.token_ids) for row in batch] == [list(row.token_ids) for row in plain]
    # No engine answers within a millionth of a second, but a busy event loop may see its answer as soon as the time.
    for row in batch:
        assert row.reward is not None and (row.reward.error is None) == (row.reward.version is not None)
        assert row.reward.error is None or row.reward.error.code == "timeout"
    for reward, status in (("nobody", 404), ("policy", 400)):
        with pytest.raises(ServerError) as refused:
            client.rollouts(PROMPTS, reward=reward, max_tokens=4)
        assert refused.value.status == status
