"""`POST /v1/rewards` and `POST /get_reward`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient
from safetensors.numpy import load

from rollout_server.schemas.pooling.rewards import GetRewardReply, RewardsReply
from tests.support.http.fake_engine import CONTEXT, VOCABULARY, FakeEngine, head_scores, logprob

Client = TestClient[Any]


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    engine.task, engine.labels = "classify", (None,)
    return engine


def rewards(client: Client, sequences: Any = ({"token_ids": [5, 6]},), **changes: Any) -> Any:
    return client.post("/v1/rewards", json={"model": "base", "sequences": list(sequences), **changes})


def test_rewards_are_raw(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    sequences = [{"token_ids": [5, 6]}, {"text": "the cat"}, {"messages": messages}]
    reply = rewards(client, sequences).json()
    RewardsReply.model_validate(reply)
    read = engine.classified[-1].sequences
    rendered = tokenizer.apply_chat_template(messages, return_dict=False)
    assert read == ((5, 6), tuple(tokenizer.encode("the cat")), tuple(rendered))
    for entry, ids in zip(reply["rewards"], read, strict=True):
        assert entry["value"] == pytest.approx(head_scores(ids[-1], 1)[0])
        assert (entry["scores"], entry["steps"], entry["tokens"]) == ([entry["value"]], None, len(ids))
    assert (reply["labels"], reply["policy"], reply["version"]) == ([None], "base", 0)
    assert reply["digest"] == engine.info.digest
    (entry,) = rewards(client, activation="model").json()["rewards"]
    assert entry["value"] == pytest.approx(1 / (1 + np.exp(-0.06)))


def test_of_several_labels_none_is_the_value(client: Client, engine: FakeEngine) -> None:
    engine.labels = ("bad", None)
    reply = rewards(client).json()
    assert reply["labels"] == ["bad", None]
    assert reply["rewards"][0]["value"] is None
    np.testing.assert_allclose(reply["rewards"][0]["scores"], head_scores(6, 2), rtol=1e-6)


def test_steps_beside_the_whole(client: Client, engine: FakeEngine) -> None:
    reply = rewards(client, [{"token_ids": [9, 5, 9]}, {"token_ids": [5, 6]}], steps={"token_id": 9}).json()
    assert engine.classified[-1].positions == ((0, 2), (1,))
    first, second = reply["rewards"]
    np.testing.assert_allclose(first["steps"], [head_scores(9, 1)] * 2, rtol=1e-6)
    assert first["value"] == pytest.approx(0.09)
    assert second["steps"] == []


def test_a_process_reward_model_scores_its_steps_alone(client: Client, engine: FakeEngine) -> None:
    engine.task, engine.labels = "token_classify", (None, None)
    sequences = [{"token_ids": [9, 5, 9]}, {"token_ids": [5, 6]}]
    reply = rewards(client, sequences, steps={"token_id": 9}, activation="model").json()
    RewardsReply.model_validate(reply)
    first, second = reply["rewards"]
    assert (first["value"], first["scores"], second["steps"]) == (None, None, [])
    np.testing.assert_allclose(np.sum(first["steps"], axis=1), 1.0)
    reply = rewards(client, [{"token_ids": [5, 6]}], steps={"token_id": 9}).json()
    assert reply["rewards"][0]["steps"] == [], "no step is an answer, too"


STEPS_IN_TEXT = [
    ("in the cat and the", "the"),
    ("one. two.. three.", "."),
    ("the catthe cat", "t"),
    ("a ки b ки", "ки"),
    ("  the  ", " "),
]


@pytest.mark.parametrize(("text", "mark"), STEPS_IN_TEXT)
@pytest.mark.parametrize("path", ["/v1/rewards", "/pooling"])
def test_a_mark_is_found_whatever_its_tokens_have_merged_with(
    client: Client, engine: FakeEngine, tokenizer: Any, path: str, text: str, mark: str
) -> None:
    """The slow way: the token at which the text, decoded from the beginning, first holds an occurrence whole."""
    engine.task = "token_classify"
    ids = tokenizer.encode(text)
    ends = [at + len(mark) for at in range(len(text)) if text.startswith(mark, at)]
    held = [len(tokenizer.decode(ids[: at + 1]).rstrip("\ufffd")) for at in range(len(ids))]
    expected = sorted({next(at for at, length in enumerate(held) if length >= end) for end in ends})
    field = {"sequences": [{"text": text}]} if path == "/v1/rewards" else {"input": text}
    client.post(path, json={"model": "base", "steps": {"text": mark}, **field}).raise_for_status()
    assert engine.classified[-1].positions == (tuple(expected),)


@pytest.mark.parametrize(("text", "mark"), STEPS_IN_TEXT)
@pytest.mark.parametrize("path", ["/v1/rewards", "/pooling"])
def test_a_mark_is_found_in_messages_as_they_were_rendered(
    client: Client, engine: FakeEngine, tokenizer: Any, path: str, text: str, mark: str
) -> None:
    """At the tokens at which it is found in the rendered text, sent as text."""
    engine.task = "token_classify"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text}{text}"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    plain = {"text": whole} if path == "/v1/rewards" else {"input": whole}
    found = []
    for given in ({"messages": messages}, {**plain, "add_special_tokens": False}):
        field = {"sequences": [given]} if path == "/v1/rewards" else given
        client.post(path, json={"model": "base", "steps": {"text": mark}, **field}).raise_for_status()
        found.append((engine.classified[-1].sequences, engine.classified[-1].positions))
    assert found[0] == found[1]
    assert len(found[0][1][0]) > 1


def test_a_mark_that_ids_hold_within_other_tokens_is_refused(
    client: Client, engine: FakeEngine, tokenizer: Any, problem: Callable[..., Any]
) -> None:
    engine.task = "token_classify"
    ids, own = tokenizer.encode("in the cat and the"), tokenizer.encode("the")
    assert [ids[at : at + len(own)] for at in range(len(ids))].count(own) == 1, "the other is part of a longer token"
    response = rewards(client, [{"token_ids": ids}], steps={"text": "the"})
    message = problem(response, 400, "invalid_field", "steps.text")["message"]
    assert "2 times in the text" in message and "1 time as tokens" in message
    (entry,) = rewards(client, [{"token_ids": ids}], steps={"text": "dog"}).json()["rewards"]
    assert entry["steps"] == [], "what is not there is no fault"
    rewards(client, [{"token_ids": [5, *own, 6]}], steps={"text": "the"}).raise_for_status()
    assert engine.classified[-1].positions == ((len(own),),)


def test_tokens_as_labels_at_the_steps_of_a_decoder(client: Client, engine: FakeEngine) -> None:
    engine.task, engine.labels = "generate", ()
    body = {"sequences": [{"token_ids": [9, 5, 9, 6]}], "steps": {"token_id": 9}, "label_token_ids": [3, 4]}
    (entry,) = rewards(client, **body).json()["rewards"]
    assert engine.classified[-1].positions == ((0, 2, 3),)
    np.testing.assert_allclose(entry["steps"], [[logprob(3), logprob(4)]] * 2, rtol=1e-6)
    (entry,) = rewards(client, **body, activation="model").json()["rewards"]
    np.testing.assert_allclose(np.sum(entry["steps"], axis=1), 1.0)


def test_the_file_says_what_the_json_says(client: Client, engine: FakeEngine) -> None:
    engine.labels = ("a", None)
    body = {"model": "base", "sequences": [{"token_ids": [9, 5]}, {"token_ids": [6]}], "steps": {"token_id": 9}}
    plain = client.post("/v1/rewards", json=body).json()
    response = client.post("/v1/rewards", json=body, headers={"accept": "application/vnd.safetensors"})
    arrays = load(response.content)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "scores": "float32",
        "step_scores": "float32",
        "step_offsets": "int64",
    }
    np.testing.assert_allclose(arrays["scores"], [entry["scores"] for entry in plain["rewards"]], rtol=1e-6)
    np.testing.assert_allclose(arrays["step_scores"], plain["rewards"][0]["steps"], rtol=1e-6)
    assert arrays["step_offsets"].tolist() == [0, 1, 1]
    header = json.loads(response.content[8 : 8 + int.from_bytes(response.content[:8], "little")])
    assert json.loads(header["__metadata__"]["reply"])["labels"] == ["a", None]


def test_the_request_of_openrlhf_runs_as_it_is(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    """As its remote reward model is asked; its own server takes special tokens off and puts one end token behind."""
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    body = {
        "query": [f"{pad}{end}the cat{end}{pad}{pad}", "a dog"],
        "prompts": ["the", "a"],
        "labels": ["1", None],
    }
    reply = client.post("/get_reward", json=body).json()
    GetRewardReply.model_validate(reply)
    read = engine.classified[-1].sequences
    texts = ("the cat", "a dog")
    assert read == tuple((*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id) for text in texts)
    expected = [head_scores(ids[engine.info.head_position(ids)], 1)[0] for ids in read]
    np.testing.assert_allclose(reply["rewards"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sequences": []}, "sequences"),
        ({"sequences": [{}]}, "sequences[0]"),
        ({"sequences": [{"token_ids": []}]}, "sequences[0].token_ids"),
        ({"sequences": [{"token_ids": [1], "text": "a"}]}, "sequences[0]"),
        ({"sequences": [{"token_ids": [1, VOCABULARY]}]}, "sequences[0].token_ids[1]"),
        ({"sequences": [{"text": ""}]}, "sequences[0].text"),
        ({"sequences": [{"messages": []}]}, "sequences[0].messages"),
        ({"sequences": [{"text": "a", "tools": []}]}, "sequences[0].tools"),
        ({"steps": {}}, "steps"),
        ({"steps": {"token_id": 1, "text": "a"}}, "steps"),
        ({"steps": {"token_id": VOCABULARY}}, "steps.token_id"),
        ({"steps": {"text": ""}}, "steps.text"),
        ({"steps": {"positions": [[0], [1]]}}, "steps.positions"),
        ({"steps": {"positions": [[2]]}}, "steps.positions[0]"),
        ({"steps": {"positions": [[1, 1]]}}, "steps.positions[0]"),
        ({"label_token_ids": [VOCABULARY]}, "label_token_ids[0]"),
        ({"activation": "sigmoid"}, "activation"),
        ({"activation": True}, "activation"),
    ],
    ids=str,
)
def test_bad_input(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    error = problem(rewards(client, **changes), 400, "invalid_field")
    assert error["param"].split("[positions")[0] == param, error


def test_refusals_by_name(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    problem(rewards(client, [{"token_ids": [1] * (CONTEXT + 1)}]), 400, "context_length_exceeded", "sequences[0]")
    problem(client.post("/get_reward", json={"query": []}), 400, "invalid_field", "query")
    engine.labels = (None, None)
    problem(client.post("/get_reward", json={"query": ["a"]}), 400, "invalid_field", "model")
    before = len(engine.classified)
    body = {"query": ["a"], "model": "base"}
    assert "2 labels" in problem(client.post("/get_reward", json=body), 400, "invalid_field", "model")["message"]
    assert len(engine.classified) == before, "what is known before is said before"
    engine.task = "token_classify"
    problem(rewards(client), 400, "invalid_field", "steps")
    problem(client.post("/get_reward", json={"query": ["a"]}), 400, "invalid_field", "model")
    engine.task = "generate"
    assert "generates" in problem(rewards(client), 400, "invalid_field", "model")["message"]
