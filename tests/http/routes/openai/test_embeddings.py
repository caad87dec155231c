"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.errors import NonFiniteLogits
from rollout_server.http.routes.openai.embeddings import finished
from rollout_server.rollout import PolicyAddress
from rollout_server.schemas.openai.embeddings import EmbeddingsReply
from tests.support.http.fake_engine import CONTEXT, VOCABULARY, FakeEngine, pooled
from tests.support.http.shared_routes import make_app

Client = TestClient[Any]


def ask(client: Client, **changes: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": "base", "input": [5, 6, 7], **changes})


def unit(ids: list[int], dimensions: int | None = None) -> np.ndarray:
    vector = np.array(pooled(ids))[:dimensions]
    return vector / np.linalg.norm(vector)


def test_four_forms_of_input(client: Client, engine: FakeEngine, tokenizer: Any) -> None:
    texts = ["the cat", "你好"]
    ids = [tokenizer.encode(text) for text in texts]
    for given, expected in ((texts[0], ids[:1]), (texts, ids), (ids[0], ids[:1]), (ids, ids)):
        reply = ask(client, input=given).json()
        EmbeddingsReply.model_validate(reply)
        assert engine.embeds[-1].sequences == tuple(map(tuple, expected))
        assert [entry["index"] for entry in reply["data"]] == list(range(len(expected)))
        for entry, tokens in zip(reply["data"], expected, strict=True):
            np.testing.assert_allclose(entry["embedding"], unit(tokens), rtol=1e-6)
        count = sum(map(len, expected))
        assert reply["usage"] == {"prompt_tokens": count, "total_tokens": count}
        assert (reply["object"], reply["model"]) == ("list", "base")


def test_base64_holds_the_same_floats(client: Client) -> None:
    (entry,) = ask(client, encoding_format="base64", user="me").json()["data"]
    (same,) = ask(client, encoding_format="float").json()["data"]
    assert np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").tolist() == same["embedding"]


def test_fewer_dimensions_have_length_one_again(client: Client, engine: FakeEngine) -> None:
    for normalise in (True, False):
        engine.embedding = replace(engine.embedding, normalise=normalise)
        (entry,) = ask(client, dimensions=2).json()["data"]
        np.testing.assert_allclose(entry["embedding"], unit([5, 6, 7], 2), rtol=1e-6)
    (entry,) = ask(client).json()["data"]
    assert entry["embedding"] == pooled([5, 6, 7]), "the model's files ask for no norm"


def test_a_version_is_addressed_and_named(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    response = ask(client, model="policy@1")
    assert engine.embeds[-1].policy == PolicyAddress("policy", number=1)
    first = engine.find("policy", 1)
    assert (response.headers["x-policy"], response.headers["x-policy-digest"]) == ("policy@1", first.digest)
    assert ask(client, model="policy").headers["x-policy"] == "policy@2"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"input": ""}, "invalid_field", "input"),
        ({"input": []}, "invalid_field", "input"),
        ({"input": [[1], []]}, "invalid_field", "input[1]"),
        ({"input": [1, VOCABULARY]}, "invalid_field", "input[1]"),
        ({"input": [[1], [2, VOCABULARY]]}, "invalid_field", "input[1][1]"),
        ({"input": [1] * (CONTEXT + 1)}, "context_length_exceeded", "input"),
        ({"input": [[1], [1] * (CONTEXT + 1)]}, "context_length_exceeded", "input[1]"),
        ({"input": {"text": "a"}}, "invalid_field", "input"),
        ({"input": None}, "invalid_field", "input"),
        ({"dimensions": 0}, "invalid_field", "dimensions"),
        ({"dimensions": 5}, "invalid_field", "dimensions"),
        ({"encoding_format": "int8"}, "invalid_field", "encoding_format"),
        ({"truncate_prompt_tokens": 0}, "invalid_field", "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "invalid_field", "truncate_prompt_tokens"),
        ({"user": 5}, "invalid_field", "user"),
    ],
)
def test_what_is_wrong_is_named(
    client: Client, engine: FakeEngine, problem: Callable[..., Any], changes: Any, code: str, param: str
) -> None:
    problem(ask(client, **changes), 400, code, param)
    assert not engine.embeds


def test_too_many_inputs_are_refused_before_they_are_read(engine: FakeEngine, problem: Callable[..., Any]) -> None:
    with TestClient(make_app(ServerConfig(max_rows_per_request=2), engine)) as client:  # type: ignore[arg-type]
        for given in (["a"] * 3, [[1]] * 3):
            problem(ask(client, input=given), 400, "invalid_field", "input")
        for given in ([1] * 3, "abc", ["a", "b"]):
            assert ask(client, input=given).status_code == 200


def test_a_model_that_cannot_embed_says_why(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.embedding = replace(engine.embedding, refusal="This model is pooled by cls.")
    assert "cls" in problem(ask(client), 400, "invalid_field", "model")["message"]


def test_errors_are_those_of_the_other_routes(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    problem(ask(client, model="nobody"), 404, "unknown_policy", "model")
    engine.fault = NonFiniteLogits("The model produced NaN.")
    problem(ask(client), 500, "non_finite_logits")


def test_zero_and_huge_vectors_stay_finite() -> None:
    big = float(np.finfo(np.float32).max)
    vectors = finished(np.array([[0.0, 0.0], [big, big], [1e-40, 0.0]], "<f4"), None, normalise=True)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[1], [2**-0.5, 2**-0.5], rtol=1e-6)
