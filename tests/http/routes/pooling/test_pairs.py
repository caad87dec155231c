"""`POST /score` and `POST /rerank`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from rollout_server.http.routes.pooling.pairs import MOST_DOCUMENTS
from rollout_server.schemas.pooling.pairs import RerankReply, ScoreReply, TokenScoreReply
from tests.support.http.fake_engine import FakeEngine, head_scores, logprob, pooled

Client = TestClient[Any]
TEXTS = ["the cat", "a dog sat", "he"]


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    engine.task, engine.labels = "classify", (None,)
    return engine


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def score(client: Client, **body: Any) -> Any:
    return client.post("/score", json={"model": "base", **body})


def rerank(client: Client, **changes: Any) -> Any:
    return client.post("/rerank", json={"model": "base", "query": "who sat", "documents": TEXTS, **changes})


def test_both_texts_are_read_together_under_every_name(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    for path in ("/score", "/v1/score"):
        for first, second in (
            ("queries", "documents"),
            ("text_1", "text_2"),
            ("data_1", "data_2"),
            ("queries", "items"),
        ):
            reply = client.post(path, json={"model": "base", first: "who sat", second: TEXTS}).json()
            ScoreReply.model_validate(reply)
            read = engine.classified[-1].sequences
            assert read == tuple(tuple(tokenizer("who sat", text)["input_ids"]) for text in TEXTS)
            expected = [sigmoid(head_scores(ids[-1], 1)[0]) for ids in read]
            np.testing.assert_allclose([entry["score"] for entry in reply["data"]], expected, rtol=1e-6)
            assert reply["usage"]["prompt_tokens"] == sum(map(len, read))


def test_one_for_one(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    score(client, queries=["he", "a"], documents=["x", "y"], activation=False).raise_for_status()
    assert engine.classified[-1].sequences == tuple(
        tuple(tokenizer(one, other)["input_ids"]) for one, other in (("he", "x"), ("a", "y"))
    )


def test_a_model_that_gives_vectors_scores_by_the_angle(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    engine.task, engine.labels = "embed", ()
    reply = score(client, queries="who sat", documents=TEXTS).json()
    vectors = [np.array(pooled(tokenizer.encode(text))) for text in ("who sat", *TEXTS)]
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    np.testing.assert_allclose([entry["score"] for entry in reply["data"]], [unit[0] @ each for each in unit[1:]])
    assert len(engine.embeds[-1].sequences) == 4, "each text is read once"


def test_documents_come_back_best_first(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        body = {"model": "base", "query": "who sat", "documents": [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]}
        reply = client.post(path, json=body).json()
        RerankReply.model_validate(reply)
        last = [tokenizer("who sat", text)["input_ids"][-1] for text in TEXTS]
        order = sorted(range(3), key=lambda index: -last[index])
        assert [entry["index"] for entry in reply["results"]] == order
        assert [entry["document"] for entry in reply["results"]] == [{"text": TEXTS[index]} for index in order]
        scores = [entry["relevance_score"] for entry in reply["results"]]
        np.testing.assert_allclose(scores, [sigmoid(head_scores(last[index], 1)[0]) for index in order], rtol=1e-6)


def test_only_the_best_and_without_their_texts(client: Client) -> None:
    whole = rerank(client).json()["results"]
    short = rerank(client, top_n=2, return_documents=False).json()["results"]
    assert short == [{k: v for k, v in entry.items() if k != "document"} for entry in whole[:2]]
    assert rerank(client, top_n=0).json()["results"] == whole


def test_tokens_as_labels_of_any_decoder(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    engine.task, engine.labels = "generate", ()
    body = {"query": "is it", "items": [" the cat", " a dog"], "label_token_ids": [9, 10]}
    reply = score(client, **body).json()
    TokenScoreReply.model_validate(reply)
    read = engine.classified[-1]
    assert read.sequences == tuple(tuple(tokenizer.encode("is it" + item)) for item in body["items"])
    assert read.positions == tuple((len(ids) - 1,) for ids in read.sequences)
    np.testing.assert_allclose(reply["scores"], [[math.exp(logprob(9)), math.exp(logprob(10))]] * 2, rtol=1e-6)
    rows = score(client, **body, apply_softmax=True).json()["scores"]
    np.testing.assert_allclose(np.sum(rows, axis=1), 1.0)
    np.testing.assert_allclose(rows[0][0] / rows[0][1], math.exp(logprob(9) - logprob(10)), rtol=1e-6)
    score(client, **body, item_first=True).raise_for_status()
    assert engine.classified[-1].sequences[0] == tuple(tokenizer.encode(" the catis it"))
    score(client, query=[5], items=[[6], [7, 8]], label_token_ids=[9]).raise_for_status()
    assert engine.classified[-1].sequences == ((5, 6), (5, 7, 8))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, ""),
        ({"queries": "a"}, ""),
        ({"queries": "a", "text_1": "b", "documents": "c"}, ""),
        ({"queries": "", "documents": "c"}, "queries"),
        ({"queries": "a", "documents": []}, "documents"),
        ({"queries": ["a", "b"], "documents": ["c"]}, "queries"),
        ({"queries": ["a", "b"], "documents": ["c", "d", "e"]}, "queries"),
        ({"queries": "a", "documents": "b", "apply_softmax": True}, "apply_softmax"),
        ({"queries": "a", "items": [[1, 2]]}, "items"),
        ({"query": "a", "items": ["b"]}, "query"),
        ({"query": "a", "label_token_ids": [1]}, "label_token_ids"),
        ({"query": "a", "items": ["b"], "label_token_ids": []}, "label_token_ids"),
        ({"query": "a", "items": ["b"], "label_token_ids": [10**6]}, "label_token_ids[0]"),
        ({"query": "a", "items": [], "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": [[1]], "label_token_ids": [1]}, "items[0]"),
        ({"query": "a", "items": ["b"], "documents": "c", "label_token_ids": [1]}, "documents"),
        ({"queries": "a", "documents": ["b"] * 10_000}, "documents"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_pairs(client: Client, body: Any, param: str, problem: Callable[..., Any]) -> None:
    error = problem(score(client, **body), 400, "invalid_field")
    assert (error["param"] or "") == param, error


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents[1]"),
        ({"documents": [5]}, "documents[0]"),
        ({"documents": [{"title": "a"}]}, "documents[0].title"),
        ({"documents": ["a"] * 10_000}, "documents"),
        ({"top_n": -1}, "top_n"),
        ({"rank_fields": ["text"]}, "rank_fields"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_documents(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    error = problem(rerank(client, **changes), 400, "invalid_field")
    assert error["param"].split("]")[0] == param.split("]")[0], error


def test_ten_thousand_documents_are_told_how_many_fit(client: Client, problem: Callable[..., Any]) -> None:
    error = problem(rerank(client, documents=["a"] * 10_000), 400, "invalid_field", "documents")
    assert str(MOST_DOCUMENTS) in error["message"]


def test_what_generates_orders_nothing(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    """The states of a language model say nothing of how well a text answers."""
    engine.task, engine.labels = "generate", ()
    for response in (rerank(client), score(client, queries="a", documents="b")):
        assert "has no head" in problem(response, 400, "invalid_field", "model")["message"]
    assert not engine.embeds


def test_several_labels_are_no_order(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.labels = (None, None)
    for response in (rerank(client), score(client, queries="a", documents="b")):
        assert "2 labels" in problem(response, 400, "invalid_field", "model")["message"]
    assert not engine.classified, "what is known before is said before"
    engine.task = "token_classify"
    problem(rerank(client), 400, "invalid_field", "model")
