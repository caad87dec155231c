"""One line a record, as text or as JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from typing import Any

from litestar.testing import TestClient

from rollout_server import logs


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
