"""`POST /v1/abort`, `POST /v1/release` and `POST /reset_prefix_cache`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.errors import EngineUnavailable
from rollout_server.schemas.control import AbortReply, ReleaseReply, ResetReply
from tests.support.http.fake_engine import FakeEngine, Row
from tests.support.live_server import until

Client = TestClient[Any]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/rollouts": {"policy": "base", "prompts": [{"token_ids": [1, 2]}]},
    "/v1/completions": {"model": "base", "prompt": [1, 2]},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_request_ends_with_what_it_has(client: Client, engine: FakeEngine, path: str) -> None:
    engine.script = lambda request, sample: Row([60, 61], hangs=True)
    replies: list[Any] = []
    headers = {"x-request-id": "mine"}
    asking = threading.Thread(target=lambda: replies.append(client.post(path, json=BODIES[path], headers=headers)))
    asking.start()
    until(lambda: "mine" in engine.open)
    body = client.post("/v1/abort", json={"ids": ["nobody", "mine", "nobody", "mine"]}).json()
    asking.join(20)
    AbortReply.model_validate(body)
    assert body == {"aborted": ["mine"], "unknown": ["nobody"]}
    (reply,) = replies
    assert reply.status_code == 200
    found = reply.json()
    (row,) = found["rollouts" if path == "/v1/rollouts" else "choices"]
    assert (row["finish_reason"], row["stop_reason"]) == ("aborted", "abort")
    if path == "/v1/rollouts":
        assert row["token_ids"] == [60, 61] and found["complete"] is False
    # the id is free again
    assert client.post("/v1/abort", json={"ids": ["mine"]}).json() == {"aborted": [], "unknown": ["mine"]}


def test_what_is_no_list_of_ids(client: Client, problem: Callable[..., Any]) -> None:
    assert client.post("/v1/abort", json={"ids": []}).json() == {"aborted": [], "unknown": []}
    for body, param in (
        ({}, "ids"),
        ({"ids": "a"}, "ids"),
        ({"ids": [1]}, "ids[0]"),
        ({"ids": [], "all": True}, "all"),
    ):
        problem(client.post("/v1/abort", json=body), 400, "invalid_field", param)


def test_kept_prefixes_are_forgotten(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    body = client.post("/reset_prefix_cache").json()
    ResetReply.model_validate(body)
    assert body == {"freed_bytes": 4096}
    problem(client.post("/reset_prefix_cache?all=1"), 400, "invalid_field", "all")
    engine.fault = EngineUnavailable("The engine is stopping.")
    problem(client.post("/reset_prefix_cache"), 503, "engine_unavailable")


@pytest.mark.parametrize("path", BODIES)
def test_cached_tokens_count_once_a_prompt(client: Client, engine: FakeEngine, path: str) -> None:
    engine.script = lambda request, sample: Row([60], cached_tokens=2 if sample else 0)
    usage = client.post(path, json={**BODIES[path], "n": 3}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_release_says_how_much(client: Client, problem: Callable[..., Any]) -> None:
    response = client.post("/v1/release")
    assert response.status_code == 200
    ReleaseReply.model_validate(response.json())
    assert response.json() == {"released_bytes": 3072, "kv_bytes": 1024}
