"""The reference of HTTP is what a server says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.schemas.weights import WeightsOptions
from tests.docs.api_page import PAGE, document, written
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    return document()


def test_the_page_is_written_from_the_document(api: dict[str, Any]) -> None:
    assert PAGE.read_text(encoding="utf-8") == written(api), "`make api` writes it anew"


def test_the_document_is_the_same_each_time(api: dict[str, Any]) -> None:
    assert document() == api


def test_every_route_is_on_the_page(api: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for path, methods in api["paths"].items():
        for method in methods:
            assert f"### `{method.upper()} {path}`" in page


def test_a_push_is_there_with_all_its_fields(api: dict[str, Any]) -> None:
    push = api["paths"]["/v1/weights"]["post"]
    form = push["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(form) == {*WeightsOptions.model_fields, "weights", "config"}
    page = written(api)
    section = page.partition("### `POST /v1/weights`")[2].partition("###")[0]
    assert all(f"| `{field}` |" in section for field in form) and "- header `If-Match`" in section


def test_what_routes_read_of_a_query_is_declared(api: dict[str, Any]) -> None:
    export = api["paths"]["/v1/weights/{name}/{version}/export"]["get"]["parameters"]
    assert {each["name"] for each in export if each["in"] == "query"} == {"format", "model"}
    reading = ("asked_resident(request)", "read_query(request", "read_flags(request")
    for file in (ROOT / "rollout_server" / "http" / "routes").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert not any(word in text for word in reading) or "operation_class=" in text, file
