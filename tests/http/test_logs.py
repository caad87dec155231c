"""One line a record, as text or as JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from typing import Any

from litestar.testing import TestClient

from rollout_server import logs
from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
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
    assert not {"request_id", "policy", "version", "code"} & models.keys(), "nothing is left of the one before"
    logs.configure("text", stream=stream)
    client.post("/v1/rollouts", json=body)
    assert stream.getvalue().endswith("[request_id=mine policy=policy version=3]\n")


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
