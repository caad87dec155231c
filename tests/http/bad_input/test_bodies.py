"""What is no JSON, not of the right type, or too large."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from litestar.testing import TestClient

from tests.http.bad_input.routes import JSON_ROUTES
from tests.laws.grids import corners
from tests.support.http.fake_engine import FakeEngine

Client = TestClient[Any]


@pytest.fixture(params=JSON_ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def send(client: Client, route: str, body: bytes, content_type: str | None = "application/json") -> Any:
    return client.post(route, content=body, headers={"content-type": content_type} if content_type else {})


def test_the_routes_take_what_is_right(client: Client, route: str) -> None:
    body = json.dumps(JSON_ROUTES[route]).encode()
    assert send(client, route, body).status_code == 200
    assert send(client, route, body, "application/json; charset=utf-8").status_code == 200


BROKEN = [
    (b"{", "not JSON"),
    (b"", "empty"),
    (b"  ", "empty"),
    (b'{"a": 1,}', "not JSON"),
    (b'{"a": 1} x', "not JSON"),
    (b"{'a': 1}", "not JSON"),
    (b"\xff\xfe{\x00}\x00", "UTF-8"),
    (b'{"a": "\xc3"}', "UTF-8"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": -Infinity}', "Infinity"),
    (b'{"policy": "a", "policy": "b"}', "twice"),
    (b'{"prompts": [{"seed": 1, "seed": 2}]}', "twice"),
    (b'{"policy": "\\ud800"}', "surrogate"),
    (b'{"\\udc00": 1}', "surrogate"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "number"),
    (b"[" * 65 + b"]" * 65, "nested"),
    (b'{"a":' * 100_00 + b"1" + b"}" * 100_00, "nested"),
    (b"[" * 100_000, "nested"),
]


@pytest.mark.parametrize(("route", "broken"), corners(list(JSON_ROUTES), BROKEN), indirect=["route"])
def test_broken_json(client: Client, route: str, broken: tuple[bytes, str], problem: Callable[..., Any]) -> None:
    body, says = broken
    error = problem(send(client, route, body), 400, "bad_body")
    assert says in error["message"] or (not body.strip() and "empty" in error["message"])


def test_a_surrogate_pair_is_a_character(client: Client, engine: FakeEngine) -> None:
    body = b'{"policy": "base", "prompts": [{"text": "\\ud83d\\ude00"}]}'
    assert send(client, "/v1/rollouts", body).status_code == 200
    assert engine.tokenizer.decode(engine.submitted[-1][1][0].prompt_ids) == "😀"


@pytest.mark.parametrize("body", [b"[]", b"1", b'"text"', b"null"])
def test_json_that_is_no_object(client: Client, route: str, body: bytes, problem: Callable[..., Any]) -> None:
    problem(send(client, route, body), 400, "invalid_field")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_wrong_content_type(client: Client, route: str, content_type: str | None, problem: Callable[..., Any]) -> None:
    body = json.dumps(JSON_ROUTES[route]).encode()
    problem(send(client, route, body, content_type), 415, "unsupported_media_type")


def test_a_json_body_over_the_limit(client: Client, route: str, problem: Callable[..., Any]) -> None:
    body = json.dumps(JSON_ROUTES[route]).encode() + b" " * 200_000
    error = problem(send(client, route, body), 413, "body_too_large")
    assert "--max-body" in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    problem(client.post(route, content=endless(), headers={"content-type": "application/json"}), 413, "body_too_large")


def test_unknown_fields_are_named(client: Client, route: str, problem: Callable[..., Any]) -> None:
    error = problem(client.post(route, json=JSON_ROUTES[route] | {"colour": "red"}), 400, "invalid_field", "colour")
    assert "colour" in error["message"]
