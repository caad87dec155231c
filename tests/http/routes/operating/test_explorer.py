"""`/schema`: a document for programs, and for a browser a page that fetches nothing from elsewhere."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from rollout_server.http.routes.operating.explorer import FILES
from tests.support.http.fake_engine import FakeEngine

Client = TestClient[Any]
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
RELEASED = {
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
}
"""SHA-256 of the files as swagger-ui-dist 5.35.0 has them."""


def test_a_program_gets_the_document_and_a_browser_the_page(client: Client) -> None:
    for accept in ("*/*", "application/json", "application/json, text/html;q=0.5"):
        assert client.get("/schema", headers={"accept": accept}).json()["openapi"].startswith("3.1")
    page = client.get("/schema", headers={"accept": BROWSER})
    assert page.headers["content-type"].startswith("text/html") and page.headers["vary"] == "accept"
    assert client.get("/schema/openapi.json", headers={"accept": BROWSER}).json()["openapi"].startswith("3.1")


def test_what_the_page_links_to_is_there_with_and_without_a_slash_at_the_end(client: Client) -> None:
    for path in ("/schema", "/schema/"):
        page = client.get(path, headers={"accept": BROWSER})
        linked = re.findall(r'(?:href|src)="(schema/[^"]+)"', page.text)
        assert len(linked) == 3
        for link in (*linked, "schema/openapi.json"):
            found = client.get(str(page.url.join(link)))
            assert found.status_code == 200 and found.headers["content-type"].count("charset") <= 1, link
        assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/schema/", headers={"accept": "application/json"}).json()["openapi"].startswith("3.1")


def test_the_page_names_no_other_place_and_runs_no_other_script(client: Client) -> None:
    page = client.get("/schema", headers={"accept": BROWSER})
    own = files(FILES).joinpath("static")
    for text in (page.text, own.joinpath("start.js").read_text()):
        assert "//" not in text.replace("// The", "")
    for path in ("/schema", *[f"/schema/files/{name}" for name in ("start.js", *RELEASED)]):
        response = client.get(path, headers={"accept": BROWSER})
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "connect-src 'self'" in policy


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_not_ours_is_as_it_was_released(client: Client, name: str) -> None:
    assert hashlib.sha256(client.get(f"/schema/files/{name}").content).hexdigest() == RELEASED[name]


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "LICENSE"])
def test_nothing_else_is_served(client: Client, name: str) -> None:
    assert client.get(f"/schema/files/{name}").status_code == 404


def test_the_document_asks_for_a_key_where_the_server_does(client: Client, engine: FakeEngine) -> None:
    document = client.get("/schema").json()
    assert "security" not in document and not document["components"].get("securitySchemes")
    config = ServerConfig(api_key="secret-1", admin_key="secret-2")  # type: ignore[arg-type]
    with TestClient(create_app(config, engine)) as protected:  # type: ignore[arg-type]
        document = protected.get("/schema").json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


def test_others_are_answered_while_the_document_is_drawn(engine: FakeEngine) -> None:
    """It takes a second of Python, once."""
    app = create_app(ServerConfig(model="nowhere"), engine)  # type: ignore[arg-type]
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        drawn, answered = pool.submit(client.get, "/schema/openapi.json"), 0
        while not drawn.done():
            answered += client.get("/health").status_code > 0
        assert drawn.result().json()["openapi"].startswith("3.1")
        # One is on its way when the drawing begins, and one when it ends.
        assert answered > 3
