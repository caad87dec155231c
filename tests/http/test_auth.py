"""Two keys, three kinds of routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.fixtures import MakeApp

API, ADMIN = "inference-key", "admin-key"
OPEN = [("GET", "/health"), ("GET", "/ready"), ("GET", "/schema"), ("GET", "/"), ("GET", "/page/files/app.js")]
INFERENCE = [
    ("POST", "/v1/rollouts"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/embeddings"),
    *[("POST", f"{prefix}/classify") for prefix in ("", "/v1")],
    *[("POST", f"{prefix}/score") for prefix in ("", "/v1")],
    *[("POST", f"{prefix}/rerank") for prefix in ("", "/v1", "/v2")],
    ("POST", "/pooling"),
    ("POST", "/get_reward"),
    ("POST", "/v1/rewards"),
    ("POST", "/v1/logprobs"),
    ("POST", "/v1/replay"),
    ("POST", "/v1/probe"),
    ("POST", "/v1/abort"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/base"),
    ("GET", "/metrics"),
    ("GET", "/page/state"),
    ("GET", "/page/rollouts/1"),
    ("GET", "/is_paused"),
    ("GET", "/v1/weights"),
    ("GET", "/v1/weights/policy"),
    ("GET", "/v1/weights/policy/1/export"),
    ("GET", "/v1/fleet"),
]
STATE = [
    ("POST", "/v1/weights"),
    ("POST", "/v1/weights/policy/activate"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/v1/pause"),
    ("POST", "/v1/resume"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("PATCH", "/v1/weights/policy/1"),
    ("DELETE", "/v1/weights/policy/1"),
    ("DELETE", "/v1/weights/policy"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/v1/release"),
    ("POST", "/v1/fleet/local-0/drain"),
    ("POST", "/v1/fleet/local-0/restart"),
    ("DELETE", "/v1/fleet/local-0"),
]
KINDS = {"open": OPEN, "inference": INFERENCE, "state": STATE}

# keys of the server → key that is sent → what each kind of route answers; None: it lets in
MATRIX: dict[tuple[str | None, str | None], dict[str | None, dict[str, int | None]]] = {
    (None, None): {
        None: {"inference": None, "state": None},
        "anything": {"inference": None, "state": None},
    },
    (API, ADMIN): {
        None: {"inference": 401, "state": 401},
        "anything": {"inference": 401, "state": 401},
        API: {"inference": None, "state": 403},
        ADMIN: {"inference": None, "state": None},
    },
    (API, None): {
        None: {"inference": 401, "state": 401},
        "anything": {"inference": 401, "state": 401},
        API: {"inference": None, "state": 403},
    },
    (None, ADMIN): {
        None: {"inference": 401, "state": 401},
        "anything": {"inference": 401, "state": 401},
        ADMIN: {"inference": None, "state": None},
    },
}


@contextmanager
def serving(app: MakeApp, engine: FakeEngine, api: str | None, admin: str | None) -> Iterator[TestClient[Any]]:
    config = ServerConfig(api_key=api, admin_key=admin)  # type: ignore[arg-type]
    with TestClient(app(config, engine)) as client:
        yield client


@pytest.mark.parametrize("keys", MATRIX, ids=str)
def test_who_may_do_what(
    keys: tuple[str | None, str | None], engine: FakeEngine, made_app: MakeApp, problem: Callable[..., Any]
) -> None:
    engine.add("other")
    with serving(made_app, engine, *keys) as client:
        for sent, expected in MATRIX[keys].items():
            headers = {} if sent is None else {"authorization": f"Bearer {sent}"}
            for kind, status in ({"open": None} | expected).items():
                for method, path in KINDS[kind]:
                    response = client.request(method, path, headers=headers)
                    if status is None:
                        assert response.status_code not in (401, 403), (keys, sent, path)
                    else:
                        problem(response, status, {401: "unauthorized", 403: "forbidden"}[status])


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic " + API, API, f"Bearer {API}x", f"Bearer {API[:-1]}", f"Token {API}"]
)
def test_what_is_no_key(engine: FakeEngine, made_app: MakeApp, header: str, problem: Callable[..., Any]) -> None:
    with serving(made_app, engine, API, ADMIN) as client:
        response = client.get("/v1/models", headers={"authorization": header})
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"


def test_the_scheme_has_no_case_and_keys_do(engine: FakeEngine, made_app: MakeApp) -> None:
    with serving(made_app, engine, API, ADMIN) as client:
        assert client.get("/v1/models", headers={"authorization": f"bearer {API}"}).status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"Bearer {API.upper()}"}).status_code == 401


def test_nothing_is_read_of_a_push_without_a_key(
    engine: FakeEngine, made_app: MakeApp, problem: Callable[..., Any]
) -> None:
    with serving(made_app, engine, API, ADMIN) as client:
        response = client.post("/v1/weights", content=b"x" * 10, headers={"content-type": "text/plain"})
        problem(response, 401, "unauthorized")
