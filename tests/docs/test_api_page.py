"""The reference of HTTP is what a server says of itself."""

from __future__ import annotations

from tests.docs.api_page import PAGE, document, written


def test_the_page_is_written_from_the_document() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(document()), "`make api` writes it anew"


def test_the_document_is_the_same_each_time() -> None:
    assert document() == document()


def test_every_route_is_on_the_page() -> None:
    page, api = PAGE.read_text(encoding="utf-8"), document()
    for path, methods in api["paths"].items():
        for method in methods:
            assert f"### `{method.upper()} {path}`" in page
