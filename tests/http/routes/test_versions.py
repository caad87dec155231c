"""Pin, delete and export over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from adapters.formats.read import read_bundle
from rollout_server.schemas.weights import DeleteReply, PinReply
from tests.support.http.fake_engine import LAYERS, FakeEngine
from tests.support.http.fixtures import PEFT_CONFIG

Client = TestClient[Any]


def kept(client: Client, name: str = "policy") -> list[int]:
    return [version["version"] for version in client.get(f"/v1/weights/{name}").json()["versions"]]


def test_a_pin_is_set_shown_and_taken_away(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    pinned = client.patch("/v1/weights/policy/1", json={"pinned": True})
    assert pinned.status_code == 200
    PinReply.model_validate(pinned.json())
    assert (pinned.json()["version"], pinned.json()["pinned"], pinned.json()["live"]) == (1, True, False)
    engine.add("policy", 20)
    assert kept(client) == [1, *range(15, 23)]
    assert client.patch("/v1/weights/policy/1", json={"pinned": False}).json()["pinned"] is False
    assert kept(client) == list(range(15, 23))


@pytest.mark.parametrize(
    ("body", "param"),
    [({"pinned": 1}, "pinned"), ({"pinned": "true"}, "pinned"), ({}, "pinned"), ({"pinned": True, "x": 1}, "x")],
)
def test_a_pin_is_a_boolean(
    client: Client, engine: FakeEngine, problem: Callable[..., Any], body: Any, param: str
) -> None:
    engine.add("policy")
    problem(client.patch("/v1/weights/policy/1", json=body), 400, "invalid_field", param)


def test_a_version_is_deleted_unless_it_is_live(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 3)
    error = problem(client.delete("/v1/weights/policy/3"), 409, "conflict", "version")
    assert "live" in error["message"] and error["retryable"] is False
    gone = client.delete("/v1/weights/policy/1")
    assert gone.status_code == 200
    DeleteReply.model_validate(gone.json())
    assert (gone.json()["deleted"], gone.json()["rows_in_use"]) == ([1], 0)
    assert kept(client) == [2, 3]


def test_every_route_that_names_a_freed_version_says_so(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 2)
    client.delete("/v1/weights/policy/1")
    row = {"prompts": [{"token_ids": [1]}], "sampling": {"max_tokens": 1}}
    for response in (
        client.delete("/v1/weights/policy/1"),
        client.patch("/v1/weights/policy/1", json={"pinned": True}),
        client.get("/v1/weights/policy/1/export"),
        client.post("/v1/weights/policy/activate", json={"version": 1}),
        client.post("/v1/rollouts", json={"policy": "policy@1", **row}),
        client.post("/v1/logprobs", json={"policy": "policy@1", "sequences": [{"token_ids": [1, 2]}]}),
        client.post("/v1/completions", json={"model": "policy@1", "prompt": [1]}),
    ):
        problem(response, 409, "version_gone")


def test_a_name_is_deleted_and_its_numbers_go_on(
    client: Client, engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    engine.add("policy", 2)
    gone = client.delete("/v1/weights/policy").json()
    assert gone["deleted"] == [1, 2]
    problem(client.get("/v1/weights/policy"), 404, "unknown_policy")
    problem(client.delete("/v1/weights/policy"), 404, "unknown_policy")
    row = {"prompts": [{"token_ids": [1]}], "sampling": {"max_tokens": 1}}
    problem(client.post("/v1/rollouts", json={"policy": "policy", **row}), 404, "unknown_policy")
    problem(client.post("/v1/rollouts", json={"policy": "policy@2", **row}), 409, "version_gone")
    problem(client.post("/v1/weights/policy/activate", json={"version": 2}), 409, "version_gone")
    assert client.get("/v1/weights").json()["policies"] == []
    assert push().json()["version"] == 3
    assert kept(client) == [3]


def test_what_never_was_is_unknown(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.add("policy")
    for name, version in (("policy", 9), ("policy", 0), ("nobody", 1)):
        problem(client.delete(f"/v1/weights/{name}/{version}"), 404, "unknown_policy")
        problem(client.patch(f"/v1/weights/{name}/{version}", json={"pinned": True}), 404, "unknown_policy")
        problem(client.get(f"/v1/weights/{name}/{version}/export"), 404, "unknown_policy")
    problem(client.delete("/v1/weights/policy/latest"), 404, "not_found")


def test_a_condition_that_is_not_looked_at_is_refused(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 2)
    match = {"if-match": '"7"'}
    for response in (
        client.delete("/v1/weights/policy/1", headers=match),
        client.delete("/v1/weights/policy", headers=match),
        client.patch("/v1/weights/policy/1", json={"pinned": True}, headers=match),
    ):
        problem(response, 400, "unsupported_field", "If-Match")
    assert kept(client) == [1, 2]


@pytest.mark.parametrize("format", ["peft", "mlx"])
def test_an_export_is_pushed_back_to_the_same_digest(client: Client, push: Callable[..., Any], format: str) -> None:
    digest = push().json()["digest"]
    response = client.get(f"/v1/weights/policy/1/export?format={format}")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/vnd.safetensors"
    assert (response.headers["x-policy"], response.headers["x-policy-digest"]) == ("policy@1", digest)
    assert read_bundle(response.content, None, format=format, layers=LAYERS).digest == digest
    again = push(name="copy", weights=response.content, config=None).json()
    assert (again["digest"], again["version"]) == (digest, 1)


def test_what_a_format_cannot_say_is_409(client: Client, push: Callable[..., Any], problem: Callable[..., Any]) -> None:
    assert push(config=PEFT_CONFIG | {"alpha_pattern": {"q_proj": 32}}).status_code == 201
    problem(client.get("/v1/weights/policy/1/export?format=mlx"), 409, "conflict", "format")
    peft = client.get("/v1/weights/policy/1/export").content
    header = json.loads(peft[8 : 8 + int.from_bytes(peft[:8], "little")])
    assert json.loads(header["__metadata__"]["adapter_config"])["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("query", "param"), [("format=gguf", "format"), ("colour=red", "colour"), ("format=peft&format=mlx", "format")]
)
def test_the_query_of_an_export_is_strict(
    client: Client, push: Callable[..., Any], problem: Callable[..., Any], query: str, param: str
) -> None:
    push()
    problem(client.get(f"/v1/weights/policy/1/export?{query}"), 400, "invalid_field", param)
