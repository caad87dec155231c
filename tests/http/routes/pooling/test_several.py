"""Which model is meant where several score, and what each is said to give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from adapters.versions.registry import Facts
from rollout_server.http.service import resident_in
from rollout_server.rollout import PolicyAddress
from tests.support.http.fake_engine import FakeEngine

RESIDENTS = {"rm": "/models/rm", "judge": "org/judge", "one": "/models/both", "two": "/models/both"}
Client = TestClient[Any]


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    """A base that generates, a reward model, and a process reward model."""
    engine.add("policy", 1)
    for name, task, labels in (("rm", "classify", 1), ("prm", "token_classify", 2)):
        facts = Facts("lora", "adapter", 2, 2, 64, task, labels)  # type: ignore[arg-type]
        engine.registry.publish(name, f"sha256:{name:x<64}", facts, created=1.0)
    engine.labels = (None,)
    return engine


def test_the_list_of_models_says_what_each_gives(client: Client) -> None:
    cards = {card["id"]: (card["task"], card["labels"]) for card in client.get("/v1/models").json()["data"]}
    assert cards["base"][0] == cards["policy"][0] == cards["policy@1"][0] == "generate"
    assert cards["rm"] == cards["rm@1"] == ("classify", [None])
    assert cards["prm"] == ("token_classify", [None, None])
    versions = client.get("/v1/weights/rm").json()["versions"]
    assert (versions[0]["task"], versions[0]["labels"]) == ("classify", 1)


def test_versions_that_score_what_the_base_does_are_listed_with_its_names(client: Client, engine: FakeEngine) -> None:
    engine.task, engine.labels = "classify", ("bad", "good")
    for name, labels in (("alike", 2), ("other", 3)):
        facts = Facts("lora", "adapter", 2, 2, 64, "classify", labels)
        engine.registry.publish(name, f"sha256:{name:x<64}", facts, created=1.0)
    cards = {card["id"]: card["labels"] for card in client.get("/v1/models").json()["data"]}
    assert cards["base"] == cards["alike"] == cards["alike@1"] == ["bad", "good"]
    assert cards["other"] == cards["other@1"] == [None] * 3


def test_a_reward_needs_no_name_where_only_one_model_gives_it(client: Client, engine: FakeEngine) -> None:
    reply = client.post("/get_reward", json={"query": ["a"], "prompts": ["a"], "labels": ["b"]})
    assert engine.classified[-1].policy == PolicyAddress("rm")
    assert reply.headers["x-policy"] == "rm@1"


def test_where_several_do_they_are_named(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    assert client.post("/classify", json={"input": [5]}).headers["x-policy"] == "rm@1"
    error = problem(client.post("/pooling", json={"input": [5]}), 400, "invalid_field", "model")
    assert "prm, rm" in error["message"]
    facts = Facts("lora", "adapter", 2, 2, 64, "classify", 1)
    engine.registry.publish("other", "sha256:" + "0" * 64, facts, created=1.0)
    error = problem(client.post("/get_reward", json={"query": ["a"]}), 400, "invalid_field", "model")
    assert "other, rm" in error["message"]
    assert client.post("/get_reward", json={"query": ["a"], "model": "other"}).status_code == 200


PAIRS: dict[str, dict[str, Any]] = {
    "/score": {"queries": "a", "documents": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
}


@pytest.mark.parametrize("path", PAIRS)
def test_what_has_several_labels_is_no_choice_where_only_one_can_order(
    client: Client, engine: FakeEngine, path: str, problem: Callable[..., Any]
) -> None:
    facts = Facts("lora", "adapter", 2, 2, 64, "classify", 3)
    engine.registry.publish("clf", "sha256:" + "0" * 64, facts, created=1.0)
    reply = client.post(path, json=PAIRS[path])
    assert reply.headers.get("x-policy") == "rm@1", reply.text
    engine.task, engine.labels = "embed", ()
    error = problem(client.post(path, json=PAIRS[path]), 400, "invalid_field", "model")
    assert "(base, rm)" in error["message"], "a model of vectors has no label, and answers"
    engine.task, engine.labels = "generate", (None,)
    engine.registry.delete_name("rm")
    error = problem(client.post(path, json=PAIRS[path]), 400, "invalid_field", "model")
    assert "1 label score" in error["message"] and "(clf)" in error["message"]


@pytest.mark.parametrize("path", PAIRS)
def test_labels_are_those_of_the_version_that_is_named(
    client: Client, engine: FakeEngine, path: str, problem: Callable[..., Any]
) -> None:
    """A name's versions may score different numbers of labels; which one is meant is known before anything is read."""
    digests = [f"sha256:{each * 64}" for each in "01"]
    for digest, labels in zip(digests, (1, 3), strict=True):
        facts = Facts("lora", "adapter", 2, 2, 64, "classify", labels)
        engine.registry.publish("clf", digest, facts, created=1.0)
    for address in ("clf@1", f"clf@{digests[0]}"):
        assert client.post(path, json={**PAIRS[path], "model": address}).status_code == 200
    read = len(engine.classified)
    for address in ("clf", "clf@2", f"clf@{digests[1][:20]}"):
        error = problem(client.post(path, json={**PAIRS[path], "model": address}), 400, "invalid_field", "model")
        assert f"'{address}' scores 3 labels" in error["message"]
    assert len(engine.classified) == read
    problem(client.post(path, json={**PAIRS[path], "model": "clf@9"}), 404, "unknown_policy", "model")


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/classify", "policy"),
        ("/classify", "prm"),
        ("/classify", "base"),
        ("/v1/rewards", "policy"),
        ("/rerank", "prm"),
    ],
)
def test_a_model_that_does_not_do_this_is_refused_by_name(
    client: Client, path: str, model: str, problem: Callable[..., Any]
) -> None:
    body: dict[str, Any] = {"/classify": {"input": [5]}, "/rerank": {"query": "a", "documents": ["b"]}}.get(
        path, {"sequences": [{"token_ids": [5]}]}
    )
    error = problem(client.post(path, json={"model": model, **body}), 400, "invalid_field", "model")
    assert f"'{model}'" in error["message"]


@pytest.mark.parametrize(
    ("address", "name"),
    [
        *((address, "rm") for address in ("rm", "rm@0", "rm/policy", "rm/policy@3", "/models/rm")),
        ("org/judge", "judge"),
        *(
            (address, "")
            for address in ("base", "policy@3", "org/base", "/models", "/models/rm/policy", "/models/rm@1")
        ),
    ],
)
def test_names_and_what_they_were_loaded_from(address: str, name: str) -> None:
    assert resident_in(address, "org/base", RESIDENTS) == name


def test_what_two_models_were_loaded_from_is_neither() -> None:
    assert resident_in("/models/both", "base", RESIDENTS) == ""
    assert resident_in("/models/rm", "/models/rm", RESIDENTS) == "", "the id of the base is the base"
