"""Every bad input of the issue gets its clear 4xx; the server goes on and the live version stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.shared_routes import make_app

Client = TestClient[Any]


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> FakeEngine:
    """One for the whole file: nothing here may change it."""
    engine = FakeEngine(tokenizer)
    engine.add("policy", 2)
    return engine


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[Client]:
    config = ServerConfig(max_body=200_000, max_upload=100_000)
    with TestClient(make_app(config, engine)) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture(autouse=True)
def unharmed(client: Client) -> Iterator[None]:
    """Around every test here: the live version still is afterwards, and rollouts go on."""
    yield
    body = {"policy": "policy", "prompts": [{"token_ids": [1]}]}
    after = client.post("/v1/rollouts", json=body)
    assert after.status_code == 200
    assert after.json()["rollouts"][0]["versions"][0]["version"] == 2
    assert [version["version"] for version in client.get("/v1/weights/policy").json()["versions"]] == [1, 2]
