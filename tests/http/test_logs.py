"""One line a record, as text or as JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from typing import Any

from litestar.routes import HTTPRoute
from litestar.testing import TestClient

from rollout_server import logs
from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from rollout_server.schemas.fields import ID
from tests.support.http.fake_engine import FakeEngine


def test_json_lines() -> None:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    log = logging.getLogger("rollout_server.http")
    log.info("one\ntwo %s", 3, extra={"fields": {"status": 200}})
    try:
        raise ValueError("é")
    except ValueError:
        log.exception("failed")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["level"], first["message"], first["status"]) == ("info", "one\ntwo 3", 200)
    assert first["logger"] == "rollout_server.http" and first["time"].endswith("Z")
    assert "ValueError: é" in second["exception"]


def test_every_request_has_a_line(client: TestClient[Any], push: Callable[..., Any]) -> None:
    stream = io.StringIO()
    logs.configure("text", stream=stream)
    client.get("/v1/models")
    client.get("/v1/models?x=1")
    client.get("/v1/a%0a12:00:00%20ERROR%20forged")
    client.get("/v1/nothing")
    client.post("/v1/rollouts", content=b"{", headers={"content-type": "application/json"})
    models, queried, forged, _, rollouts = stream.getvalue().splitlines()
    assert "GET /v1/models 200" in models and "GET /v1/models 400" in queried
    assert r"\n12:00:00 ERROR forged 404" in forged
    assert "POST /v1/rollouts 400" in rollouts


def test_a_message_is_one_line_of_text() -> None:
    stream = io.StringIO()
    logs.configure("text", stream=stream)
    logging.getLogger("rollout_server.http").info("one\ntwo\x1b[2J é")
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("one\\ntwo\\x1b[2J é\n")


def test_a_line_says_which_request_policy_and_version(client: TestClient[Any], engine: FakeEngine) -> None:
    engine.add("policy", 3)
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    body = {"id": "mine", "policy": "policy", "prompts": [{"token_ids": [1]}]}
    client.post("/v1/rollouts", json=body)
    client.post("/v1/rollouts", json=body | {"policy": "policy@2", "id": "other"})
    client.post("/v1/rollouts", json=body | {"policy": "nobody"})
    client.get("/v1/models")
    first, pinned, refused, models = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["request_id"], first["policy"], first["version"], first["status"]) == ("mine", "policy", 3, 200)
    assert (pinned["request_id"], pinned["version"]) == ("other", 2)
    assert (refused["status"], refused["code"]) == (404, "unknown_policy")
    assert not {"policy", "version", "code"} & models.keys(), "nothing is left of the one before"
    assert models["request_id"] not in ("mine", "other")
    logs.configure("text", stream=stream)
    client.post("/v1/rollouts", json=body)
    assert stream.getvalue().endswith("[request_id=mine policy=policy version=3]\n")


def test_every_line_says_which_request(client: TestClient[Any]) -> None:
    """Whatever the route and the answer, and where no route answers."""
    routes = [route for route in client.app.routes if isinstance(route, HTTPRoute)]
    asked = [(method, route.path_format) for route in routes for method in sorted(route.methods - {"OPTIONS"})]
    # The stream of the page would be waited for.
    asked = [(method if path != "/page/events" else "HEAD", path) for method, path in asked]
    asked += [("GET", "/nowhere"), ("DELETE", "/health"), ("GET", "/v1/models?x=1"), ("OPTIONS", "/v1/weights")]
    assert {("POST", f"/v1/{name}") for name in ("weights", "logprobs", "embeddings", "replay", "rewards")} <= {*asked}
    found: list[dict[str, Any]] = []
    for headers in ({}, {"x-request-id": "mine"}, {"x-request-id": "no id, but words"}):
        stream = io.StringIO()
        logs.configure("json", stream=stream)
        for method, path in asked:
            client.request(method, path, headers=headers, json={} if method in ("POST", "PATCH") else None)
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        lines = [line for line in lines if line["logger"] == "rollout_server.access"]
        assert [line["method"] for line in lines] == [method for method, _ in asked]
        found += lines
    fresh, given, other = (found[at : at + len(asked)] for at in range(0, len(found), len(asked)))
    assert {line["request_id"] for line in given} == {"mine"}
    for lines in (fresh, other):
        ids = [line["request_id"] for line in lines]
        assert len({*ids}) == len(asked) and all(ID.fullmatch(id) for id in ids)


def test_lines_about_versions_say_which(
    client: TestClient[Any], push: Callable[..., Any], adapter: Callable[..., bytes]
) -> None:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    push("policy"), push("policy", weights=adapter(1)), push("policy", weights=adapter(1))
    push("policy", weights=b"no weights")
    client.post("/v1/weights/policy/activate", json={"version": 1})
    client.patch("/v1/weights/policy/2", json={"pinned": True})
    client.get("/v1/weights/policy/2/export")
    client.delete("/v1/weights/policy/2")
    client.get("/v1/weights/policy")
    client.delete("/v1/weights/policy")
    client.get("/v1/weights/a%0aforged")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    said = [(line.get("policy"), line.get("version")) for line in lines if line["logger"] == "rollout_server.access"]
    versions = (1, 2, 2, None, 1, 2, 2, 2, None, None)
    assert said == [*[("policy", number) for number in versions], (None, None)]


def test_neither_texts_nor_keys_are_logged(engine: FakeEngine) -> None:
    config = ServerConfig(api_key="secret-key", admin_key="other-key")  # type: ignore[arg-type]
    stream = io.StringIO()
    logs.configure("json", level=logging.DEBUG, stream=stream)
    with TestClient(create_app(config, engine)) as client:  # type: ignore[arg-type]
        client.headers["authorization"] = "Bearer secret-key"
        sampled = client.post(
            "/v1/rollouts", json={"policy": "base", "prompts": [{"text": "private"}], "return": ["text"]}
        )
        client.post("/v1/completions", json={"model": "base", "prompt": "private", "stream": True})
        client.post("/v1/completions", json={"model": "base", "prompt": "private", "made_up": "private"})
        client.get(f"/page/rollouts/{client.get('/page/state').json()['rollouts'][0]['number']}")
        client.get("/v1/models", headers={"authorization": "Bearer wrong-key"})
    written = stream.getvalue()
    assert sampled.status_code == 200 and written.count("\n") >= 6
    for secret in ("private", "secret-key", "other-key", "wrong-key", sampled.json()["rollouts"][0]["text"]):
        assert secret not in written
