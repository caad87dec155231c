"""`reward` of `POST /v1/rollouts`: what is read of a row, and how its reward is told in every encoding."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient
from safetensors.numpy import load

from adapters.versions.registry import Facts
from rollout_server.errors import EngineFault, QueueFull
from rollout_server.rollout import FinishReason
from rollout_server.schemas.rollouts import RolloutsReply
from tests.support.http.fake_engine import FakeEngine, Row, head_scores

Client = TestClient[Any]
BINARY = {"accept": "application/vnd.safetensors"}


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    """A base that generates, a policy, a reward model, and a process reward model."""
    engine.add("policy", 1)
    for name, task, labels in (("rm", "classify", 1), ("prm", "token_classify", 2)):
        facts = Facts("lora", "adapter", 2, 2, 64, task, labels)  # type: ignore[arg-type]
        engine.registry.publish(name, f"sha256:{name:x<64}", facts, created=1.0)
    engine.labels = (None,)
    return engine


def ask(client: Client, prompts: Any = ({"token_ids": [1, 2, 3]},), headers: Any = None, **fields: Any) -> Any:
    body = {"policy": "base", "prompts": list(prompts), "reward": {"model": "rm"}, **fields}
    return client.post("/v1/rollouts", json=body, headers=headers or {})


def read(engine: FakeEngine) -> list[tuple[int, ...]]:
    return [sequence for classify in engine.classified for sequence in classify.sequences]


def test_every_row_has_its_reward(client: Client, engine: FakeEngine) -> None:
    body = ask(client, [{"token_ids": [1, 2, 3]}, {"token_ids": [4]}], n=2).json()
    reply = RolloutsReply.model_validate(body)
    assert [(row.prompt_index, row.sample_index) for row in reply.rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    live = engine.live("rm")
    for row in body["rollouts"]:
        score = float(np.float32(head_scores(row["token_ids"][-1], 1)[0]))
        model = {"name": "rm", "version": 1, "digest": live.digest}
        assert row["reward"] == {"value": score, "scores": [score], "model": model}
    wanted = {(*row["prompt_token_ids"], *row["token_ids"]) for row in body["rollouts"]}
    assert set(read(engine)) == wanted
    assert engine.held == [], "it was let go"
    assert ask(client, reward=None).json()["rollouts"][0]["reward"] is None


def test_of_several_labels_none_is_the_value(client: Client, engine: FakeEngine) -> None:
    engine.labels = ("bad", "good")
    (row,) = ask(client).json()["rollouts"]
    assert row["reward"]["value"] is None
    np.testing.assert_allclose(row["reward"]["scores"], head_scores(row["token_ids"][-1], 2), rtol=1e-6)
    arrays = load(ask(client, headers=BINARY).content)
    assert np.isnan(arrays["reward"]).all()
    np.testing.assert_allclose(arrays["reward_scores"], [row["reward"]["scores"]], rtol=1e-6)


def test_what_is_read_of_a_row(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    said = [{"role": "user", "content": "the hat"}]
    engine.script = lambda request, sample: Row(
        [*tokenizer.encode("the cat", add_special_tokens=False), tokenizer.eos_token_id],
        FinishReason.STOP,
        tokenizer.eos_token_id,
    )
    for prompt, reads, wanted in (
        ({"text": "and "}, "text", tokenizer.encode("and the cat")),
        ({"text": "and ", "add_special_tokens": False}, "text", tokenizer.encode("and the cat")),
        ({"token_ids": tokenizer.encode("and ")}, "text", tokenizer.encode("and the cat")),
        (
            {"messages": said},
            "messages",
            tokenizer.apply_chat_template([*said, {"role": "assistant", "content": "the cat"}], return_dict=False),
        ),
        (
            {
                "messages": [*said, {"role": "assistant", "content": "12"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
            "messages",
            tokenizer.apply_chat_template([*said, {"role": "assistant", "content": "12the cat"}], return_dict=False),
        ),
        (
            {"messages": said, "chat_template_kwargs": {"shout": True}},
            "messages",
            tokenizer.apply_chat_template(
                [*said, {"role": "assistant", "content": "the cat"}], return_dict=False, shout=True
            ),
        ),
    ):
        reply = ask(client, [prompt], reward={"model": "rm", "as": reads})
        assert reply.status_code == 200, reply.text
        assert read(engine)[-1] == tuple(wanted), (prompt, reads)
        (position,) = engine.classified[-1].positions[0]
        assert position == engine.info.head_position(wanted)


def test_the_engine_is_told_what_the_rows_of_a_prompt_share(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    engine.script = lambda request, sample: Row(tokenizer.encode(f"{sample}!", add_special_tokens=False))
    said = [{"role": "user", "content": "how many"}]
    for prompt, reads in (
        ({"token_ids": tokenizer.encode("how many ")}, "token_ids"),
        ({"text": "how many "}, "text"),
        ({"messages": said}, "messages"),
    ):
        before = len(engine.classified)
        assert ask(client, [prompt], n=3, reward={"model": "rm", "as": reads}).status_code == 200
        asked = engine.classified[before:]
        (shared,) = {classify.shared for classify in asked}
        rows = [classify.sequences[0] for classify in asked]
        assert len(rows) == 3 and len({row[:shared] for row in rows}) == 1
        assert len({row[: shared + 1] for row in rows}) == 3, "and nothing of a reply"


def test_the_file_says_what_the_json_says(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda request, sample: Row(
        [60 + sample], FinishReason.ABORTED if sample == 1 else FinishReason.STOP
    )
    rows = ask(client, n=3).json()["rollouts"]
    assert rows[1]["reward"]["error"]["code"] == "not_scored"
    response = ask(client, n=3, headers=BINARY)
    arrays = load(response.content)
    assert (arrays["reward"].dtype, arrays["reward_scores"].shape) == (np.float32, (3, 1))
    values = [np.nan if "error" in row["reward"] else row["reward"]["value"] for row in rows]
    np.testing.assert_array_equal(arrays["reward"], np.array(values, np.float32))
    np.testing.assert_array_equal(arrays["reward_scores"][:, 0], arrays["reward"])
    header = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])
    about = json.loads(header["__metadata__"]["reply"])["rollouts"]
    assert about["reward_model"] == rows[0]["reward"]["model"]
    assert about["rows"] == {"1": {"reward": rows[1]["reward"]}}
    assert "reward" not in load(ask(client, reward=None, headers=BINARY).content)


def test_a_stream_sends_a_line_when_its_reward_is_there(client: Client, engine: FakeEngine) -> None:
    lines = [json.loads(line) for line in ask(client, n=3, stream=True).text.splitlines()]
    assert lines[-1]["done"] and lines[-1]["complete"]
    assert sorted(line["sample_index"] for line in lines[:-1]) == [0, 1, 2]
    for line in lines[:-1]:
        assert line["reward"]["value"] == float(np.float32(head_scores(line["token_ids"][-1], 1)[0]))
    assert engine.held == []


def test_a_reward_that_fails_costs_no_rollout(client: Client, engine: FakeEngine) -> None:
    async def fails(classify: Any) -> Any:
        raise EngineFault("The step that computed this row failed: a test.")

    engine.classify = fails  # type: ignore[method-assign]
    for fields in ({}, {"stream": True}):
        text = ask(client, n=2, **fields).text
        rows = [json.loads(line) for line in text.splitlines()[:-1]] if fields else json.loads(text)["rollouts"]
        assert len(rows) == 2
        for row in rows:
            assert row["finish_reason"] == "length"
            assert row["reward"]["error"]["code"] == "engine_fault"
    assert np.isnan(load(ask(client, headers=BINARY).content)["reward"]).all()
    for labels in (1, 3):
        engine.labels = (None,) * labels
        scores = load(ask(client, n=2, headers=BINARY).content)["reward_scores"]
        assert scores.shape == (2, labels) and np.isnan(scores).all()
    assert 'rollout_reward_seconds_count{outcome="failed",reward_model="rm"} 9.0' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("reward", "fields", "says"),
    [({"timeout_s": 0.05}, {}, "not there 0.05 seconds"), ({}, {"timeout_s": 0.2}, "seconds after the row had ended")],
)
def test_a_reward_that_never_comes_is_waited_for_as_long_as_the_request_says(
    client: Client, engine: FakeEngine, reward: Any, fields: Any, says: str
) -> None:
    """From the end of a row on, or until the request is over: rows come back in either case."""

    async def never(classify: Any) -> Any:
        await asyncio.sleep(10.0)  # A server that waits on has another error, and no test that hangs.
        raise EngineFault("Nobody was to wait for this: a test.")

    engine.classify = never  # type: ignore[method-assign]
    for stream in (False, True):
        reply = ask(client, n=2, reward={"model": "rm", **reward}, stream=stream, **fields)
        rows = [json.loads(line) for line in reply.text.splitlines()[:-1]] if stream else reply.json()["rollouts"]
        assert [(row["finish_reason"], row["reward"]["error"]["code"]) for row in rows] == [("length", "timeout")] * 2
        assert all(says in row["reward"]["error"]["message"] for row in rows)
        assert engine.held == [], "it was let go"


def test_rewards_are_counted_by_what_gave_them(client: Client, engine: FakeEngine) -> None:
    engine.registry.publish("other", "sha256:" + "0" * 64, Facts("lora", "adapter", 2, 2, 64, "classify", 1), created=1)
    for model in ("rm", "rm@1", f"other@sha256:{'0' * 12}"):
        ask(client, n=3, reward={"model": model})
    ask(client, reward={"model": "nobody"})
    lines = [line for line in client.get("/metrics").text.splitlines() if "rollout_reward_seconds_count" in line]
    assert sorted(lines) == [
        f'rollout_reward_seconds_count{{outcome="{outcome}",reward_model="{model}"}} {count}'
        for outcome, model, count in (
            ("failed", "other", 0.0),
            ("failed", "rm", 0.0),
            ("scored", "other", 3.0),
            ("scored", "rm", 6.0),
        )
    ]


def test_what_is_wrong_with_a_reward_is_said_before_anything_runs(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    for reward, status, code, param in (
        ({"model": "nobody"}, 404, "unknown_policy", "reward.model"),
        ({"model": "rm@7"}, 404, "unknown_policy", "reward.model"),
        ({"model": "policy"}, 400, "invalid_field", "reward.model"),
        ({"model": "base"}, 400, "invalid_field", "reward.model"),
        ({"model": "prm"}, 400, "invalid_field", "reward.model"),
        ({"model": "rm", "as": "messages"}, 400, "invalid_field", "reward.as"),
        ({"model": "rm", "as": "ids"}, 400, "invalid_field", "reward.as"),
        ({"model": "rm", "timeout_s": 0}, 400, "invalid_field", "reward.timeout_s"),
        ({"model": "rm", "steps": {}}, 400, "invalid_field", "reward.steps"),
        ({}, 400, "invalid_field", "reward.model"),
    ):
        problem(ask(client, reward=reward), status, code, param)
    assert engine.submitted == []
    engine.refusal = QueueFull("As many requests are open as --max-queue allows.")
    problem(ask(client), 429, "queue_full")
    assert engine.held == []


def test_a_request_that_fails_lets_the_reward_model_go(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.script = lambda request, sample: Row([], error=EngineFault("The step that computed this row failed."))
    for fields in ({}, {"stream": True}):
        problem(ask(client, **fields), 500, "engine_fault")
        assert engine.held == []
