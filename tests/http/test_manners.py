"""What a hostile or hurried client meets on every route."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

Client = TestClient[Any]
BODY = {"policy": "base", "prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 2}}


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/weights"])
def test_head_is_get_without_the_body(client: Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert head.status_code == whole.status_code == 200 and head.content == b""


def test_compressed_bodies_are_415(client: Client, problem: Callable[..., Any]) -> None:
    body = gzip.compress(json.dumps(BODY).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    problem(client.post("/v1/rollouts", content=body, headers=headers), 415, "unsupported_media_type")


def test_a_web_page_of_another_site_changes_nothing(
    client: Client, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    error = problem(push(headers={"origin": "http://evil.example"}), 403, "forbidden", "Origin")
    assert "evil.example" in error["message"]
    assert push(headers={"origin": "http://localhost:3000"}).status_code == 201


def test_unknown_query_parameters_are_named(client: Client, problem: Callable[..., Any]) -> None:
    problem(client.post("/v1/rollouts?foo=1", json=BODY), 400, "invalid_field", "foo")


def test_errors_stay_small_whatever_was_sent(client: Client) -> None:
    for change in (
        {"x" * 100_000: 1},
        {"policy": "p" * 100_000},
        {"sampling": {"stop": ["y" * 50_000, ""]}},
        {"sampling": {"temperature": -(10**300)}},
        {"id": "z" * 100_000},
    ):
        response = client.post("/v1/rollouts", json=BODY | change)
        assert response.status_code in (400, 404), response.text
        assert len(response.content) < 1500, response.text[:300]


def test_an_unknown_model_names_the_field_of_its_route(client: Client, problem: Callable[..., Any]) -> None:
    body = {"model": "gpt-4", "prompt": [5], "max_tokens": 2}
    problem(client.post("/v1/completions", json=body), 404, "unknown_policy", "model")
    problem(client.post("/v1/completions", json=body | {"model": "Org/Name"}), 404, "unknown_policy", "model")
