"""`/v1/pause`, `/v1/resume`, and vLLM's doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.schemas.control import IsPausedReply, PauseReply, StatusReply
from tests.support.http.fake_engine import FakeEngine

Client = TestClient[Any]


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_the_mode_shows(client: Client, engine: FakeEngine, mode: str) -> None:
    assert client.get("/health").json()["paused"] is None
    body = client.post("/v1/pause", json={"mode": mode}).json()
    PauseReply.model_validate(body)
    assert (body["paused"], body["mode"], engine.drained) == (True, mode, [False])
    assert client.get("/health").json()["paused"] == mode
    assert client.get("/ready").status_code == 200
    assert f'rollout_paused{{mode="{mode}",model="base"}} 1.0' in client.get("/metrics").text
    for sent in ({}, {"json": {}}):
        body = client.post("/v1/resume", **sent).json()
        assert (body["paused"], body["mode"]) == (False, None)
    assert client.post("/v1/pause", json={}).json()["mode"] == "wait"


@pytest.mark.parametrize(
    ("query", "mode"),
    [
        ("", "abort"),
        ("?mode=abort&clear_cache=true", "abort"),
        ("?mode=wait&clear_cache=False", "wait"),
        ("?mode=keep", "keep"),
        ("?wait_for_inflight_requests=true", "wait"),
        ("?wait_for_inflight_requests=false", "abort"),
    ],
)
def test_as_vllm_has_it(client: Client, engine: FakeEngine, query: str, mode: str) -> None:
    assert client.get("/is_paused").json() == {"is_paused": False}
    body = client.post(f"/pause{query}").json()
    StatusReply.model_validate(body)
    assert body == {"status": "paused"}
    assert (engine.paused, engine.drained) == (mode, [True])
    IsPausedReply.model_validate(client.get("/is_paused").json())
    assert client.get("/is_paused").json() == {"is_paused": True}
    assert client.post("/resume").json() == {"status": "resumed"}
    assert engine.paused is None


def test_what_is_no_pause(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    for body, param in (({"mode": "stop"}, "mode"), ({"mode": 1}, "mode"), ({"modes": "wait"}, "modes")):
        problem(client.post("/v1/pause", json=body), 400, "invalid_field", param)
    problem(client.post("/v1/resume", json={"mode": "wait"}), 400, "invalid_field", "mode")
    problem(client.post("/v1/resume", json=[]), 400, "bad_body")
    for query, param in (
        ("mode=stop", "mode"),
        ("mode=keep&mode=keep", "mode"),
        ("mode=keep&wait_for_inflight_requests=true", "mode"),
        ("clear_cache=perhaps", "clear_cache"),
        ("force=true", "force"),
    ):
        problem(client.post(f"/pause?{query}"), 400, "invalid_field", param)
    assert engine.paused is None
