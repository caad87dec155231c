"""A web page whose name leads to this machine is not a friend of the server: without keys only names that nobody else
can give away are answered."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from litestar.testing import TestClient
from pydantic import ValidationError

from rollout_server.config import ServerConfig
from tests.http.test_auth import KINDS
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.shared_routes import make_app

FRIENDS = [
    "localhost",
    "localhost:8000",
    "LocalHost.",
    "box.localhost:1",
    "127.0.0.1:8000",
    "127.8.8.8",
    "10.0.0.7:8000",
    "[::1]:8000",
    "[fe80::1]",
    "testserver.local",
]
STRANGERS = [
    "rebound.example:8000",
    "localhost.rebound.example",
    "127.0.0.1.rebound.example",
    "notlocalhost",
    "localhost:80@rebound.example",
    "rebound.example#localhost",
    "localhost rebound.example",
    "localhost, rebound.example",
    "[localhost.rebound.example]",
    "[::1].rebound.example",
    "rebound",
    ":8000",
    "",
]


@pytest.mark.parametrize("host", FRIENDS)
def test_addresses_and_names_of_this_machine_are_answered(client: TestClient[Any], host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200
    assert client.post("/v1/pause", json={"mode": "wait"}, headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", STRANGERS)
def test_no_other_name_is(client: TestClient[Any], engine: FakeEngine, host: str, problem: Callable[..., Any]) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    problem(client.post("/v1/pause", json={"mode": "wait"}, headers=headers), 403, "forbidden", "Host")
    assert engine.status.paused is None
    problem(client.get("/health", headers=headers), 403, "forbidden", "Host")


@pytest.mark.parametrize(("method", "path"), [*chain(*KINDS.values()), ("GET", "/nope"), ("OPTIONS", "/v1/models")])
def test_on_every_route(client: TestClient[Any], method: str, path: str, problem: Callable[..., Any]) -> None:
    response = client.request(method, path, headers={"host": "rebound.example:8000"})
    said = problem(response, 403, "forbidden", "Host")["message"]
    assert "rebound.example" in said and "--allow-host" in said


def answers(engine: FakeEngine, called: str, /, **options: Any) -> bool:
    with TestClient(make_app(ServerConfig(**options), engine)) as client:  # type: ignore[arg-type]
        return client.get("/health", headers={"host": called}).status_code == 200


def test_with_a_key_the_host_does_not_matter(engine: FakeEngine) -> None:
    assert answers(engine, "anything.example", api_key="k")


def test_the_configured_host_and_those_that_were_allowed_are_answered(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers(engine, "Trainer.LAN:8000", host="trainer.lan", insecure=True)
    assert not answers(engine, "rebound.example", host="0.0.0.0", insecure=True)
    monkeypatch.setenv("ROLLOUT_ALLOW_HOST", "rollouts.default.svc, GPU.box.")
    for host in ("rollouts.default.svc:8000", "gpu.box"):
        assert answers(engine, host)
    assert not answers(engine, "default.svc")


@pytest.mark.parametrize("name", ["http://proxy", "proxy:80", "a/b", "*", ""])
def test_what_is_no_name_of_a_host_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ValidationError, match="is not the name of a host"):
        ServerConfig(allow_host=[name])
