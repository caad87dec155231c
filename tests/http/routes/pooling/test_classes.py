"""`POST /classify` and `POST /pooling`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from rollout_server.http.routes.pooling.answers import activated
from rollout_server.schemas.pooling.classes import ClassifyReply, PoolingReply
from tests.support.http.fake_engine import CONTEXT, VOCABULARY, FakeEngine, head_scores, pooled

Client = TestClient[Any]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    engine.task, engine.labels = "classify", ("bad", "good")
    return engine


def classify(client: Client, **changes: Any) -> Any:
    return client.post("/classify", json={"model": "base", "input": [5, 6, 7], **changes})


def pooling(client: Client, **changes: Any) -> Any:
    return client.post("/pooling", json={"model": "base", "input": [5, 6, 7], **changes})


def softmax(scores: list[float]) -> list[float]:
    total = sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def test_four_forms_of_input(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    texts = ["the cat", "你好"]
    ids = [tokenizer.encode(text) for text in texts]
    for path in ("/classify", "/v1/classify"):
        for given, expected in ((texts[0], ids[:1]), (texts, ids), (ids[0], ids[:1]), (ids, ids)):
            reply = client.post(path, json={"model": "base", "input": given}).json()
            ClassifyReply.model_validate(reply)
            assert engine.classified[-1].sequences == tuple(map(tuple, expected))
            assert engine.classified[-1].positions == tuple((len(own) - 1,) for own in expected)
            for index, (entry, own) in enumerate(zip(reply["data"], expected, strict=True)):
                assert (entry["index"], entry["num_classes"]) == (index, 2)
                np.testing.assert_allclose(entry["probs"], softmax(head_scores(own[-1], 2)), rtol=1e-5)
                assert entry["label"] == "bad", "the label of the larger score"
            count = sum(map(len, expected))
            assert reply["usage"] == {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}


def test_raw_scores_under_both_names(client: Client) -> None:
    for field in ("use_activation", "activation"):
        (entry,) = classify(client, **{field: False}).json()["data"]
        np.testing.assert_allclose(entry["probs"], head_scores(7, 2), rtol=1e-6)
    assert classify(client, use_activation=True, activation=True).status_code == 200


def test_messages_are_judged_as_they_stand(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    client.post("/classify", json={"model": "base", "messages": MESSAGES}).raise_for_status()
    rendered = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False, return_dict=False)
    assert engine.classified[-1].sequences == (tuple(rendered),)


def test_pads_at_the_end_are_passed_over(client: Client, engine: FakeEngine) -> None:
    pad = engine.info.pad_token_id
    classify(client, input=[5, 6, 7, pad, pad]).raise_for_status()
    assert engine.classified[-1].positions == ((2,),)


def test_the_last_tokens_are_kept_where_that_is_asked_for(client: Client, engine: FakeEngine) -> None:
    for keep, left in ((2, (6, 7)), (9, (5, 6, 7)), (-1, (5, 6, 7))):
        classify(client, truncate_prompt_tokens=keep).raise_for_status()
        assert engine.classified[-1].sequences == (left,)
    long = [1] * CONTEXT + [2]
    assert classify(client, input=long).json()["error"]["code"] == "context_length_exceeded"
    classify(client, input=long, truncate_prompt_tokens=-1).raise_for_status()
    assert engine.classified[-1].sequences == (tuple(long[1:]),)
    classify(client, input="the cat " * CONTEXT, truncate_prompt_tokens=3).raise_for_status()
    assert len(engine.classified[-1].sequences[0]) == 3


def test_without_a_name_the_one_that_scores_is_meant(client: Client, engine: FakeEngine) -> None:
    response = client.post("/classify", json={"input": [5]})
    assert response.headers["x-policy"] == "base@0"
    engine.task = "generate"
    assert "No model" in client.post("/classify", json={"input": [5]}).json()["error"]["message"]


def test_the_request_of_verl_runs_as_it_is(client: Client, engine: FakeEngine) -> None:
    """As its reward loop posts it: text without the leading special token, and the last number of the last entry."""
    engine.labels = (None,)
    body = {"model": "org/tiny", "input": "<|user|>the cat<|end|>", "activation": False}
    reply = client.post("/classify", json=body).json()
    ids = engine.classified[-1].sequences[0]
    assert reply["data"][-1]["probs"][-1] == pytest.approx(head_scores(ids[engine.info.head_position(ids)], 1)[0])


def test_pooling_does_what_the_model_is_for(client: Client, engine: FakeEngine) -> None:
    reply = pooling(client, input=[[5], [6, 7]]).json()
    PoolingReply.model_validate(reply)
    expected = [softmax(head_scores(5, 2)), softmax(head_scores(7, 2))]
    np.testing.assert_allclose([entry["data"] for entry in reply["data"]], expected, rtol=1e-5)
    engine.task = "token_classify"
    reply = pooling(client, input=[[5], [6, 7]], use_activation=False).json()
    PoolingReply.model_validate(reply)
    assert engine.classified[-1].positions == ((0,), (0, 1))
    np.testing.assert_allclose(reply["data"][1]["data"], [head_scores(6, 2), head_scores(7, 2)], rtol=1e-5)
    engine.task = "generate"
    (entry,) = pooling(client).json()["data"]
    vector = np.array(pooled([5, 6, 7]))
    np.testing.assert_allclose(entry["data"], vector / np.linalg.norm(vector), rtol=1e-6)
    (entry,) = pooling(client, task="embed", use_activation=False).json()["data"]
    assert entry["data"] == pooled([5, 6, 7])


def test_steps_are_the_tokens_that_are_read(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    engine.task = "token_classify"
    ids = [5, 9, 6, 9, 9, 7]
    for steps, places in (
        ({"token_id": 9}, (1, 3, 4)),
        ({"positions": [[0, 5]]}, (0, 5)),
        ({"text": tokenizer.decode([9])}, (1, 3, 4)),
    ):
        (entry,) = pooling(client, input=ids, steps=steps, use_activation=False).json()["data"]
        assert engine.classified[-1].positions == (places,)
        np.testing.assert_allclose(entry["data"], [head_scores(ids[at], 2) for at in places], rtol=1e-5)
    found = pooling(client, input=[ids, [5, 6]], steps={"token_id": 9}).json()["data"]
    assert engine.classified[-1].sequences == (tuple(ids),)
    assert (len(found[0]["data"]), found[1]["data"]) == (3, [])


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/classify", {"input": ""}, "input"),
        ("/classify", {"input": []}, "input"),
        ("/classify", {"input": [[1], []]}, "input[1]"),
        ("/classify", {"input": [1, VOCABULARY]}, "input[1]"),
        ("/classify", {"input": None}, ""),
        ("/classify", {"messages": MESSAGES}, ""),
        ("/classify", {"tools": []}, "tools"),
        ("/classify", {"activation": True, "use_activation": False}, "activation"),
        ("/classify", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/classify", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ("/classify", {"model": 5}, "model"),
        ("/classify", {"colour": 1}, "colour"),
        ("/pooling", {"task": "generate"}, "task"),
        ("/pooling", {"task": "classify", "steps": {"token_id": 1}}, "steps"),
        ("/pooling", {"steps": {"token_id": VOCABULARY}}, "steps.token_id"),
        ("/pooling", {"encoding_format": "base64"}, "encoding_format"),
    ],
    ids=str,
)
def test_bad_input(client: Client, path: str, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    body = {"model": "base", "input": [5, 6], **changes}
    error = problem(client.post(path, json={k: v for k, v in body.items() if v is not None}), 400, "invalid_field")
    assert (error["param"] or "") == param, error


def test_what_is_not_served_yet_is_named(client: Client, problem: Callable[..., Any]) -> None:
    for field, value in (("priority", 3), ("chat_template", "x"), ("truncation_side", "right")):
        problem(classify(client, **{field: value}), 400, "unsupported_field", field)


def test_a_model_of_another_task_is_refused_by_name(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.task = "token_classify"
    assert "/pooling" in problem(classify(client), 400, "invalid_field", "model")["message"]
    engine.task = "generate"
    assert "'org/tiny' does not do this" in problem(classify(client, model="org/tiny"), 400, "invalid_field")["message"]
    problem(classify(client, model="nobody"), 404, "unknown_policy", "model")


def test_activations() -> None:
    scores = np.array([[0.0, 2.0], [-800.0, 800.0]])
    np.testing.assert_allclose(activated(scores, "sigmoid"), [[0.5, 1 / (1 + math.exp(-2))], [0.0, 1.0]])
    np.testing.assert_allclose(activated(scores, "softmax"), [softmax([0.0, 2.0]), [0.0, 1.0]])
    assert activated(scores, "none") is scores
    assert activated(np.zeros((0, 2)), "softmax").shape == (0, 2)
