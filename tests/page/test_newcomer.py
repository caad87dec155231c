"""What `make newcomer` says of the page is what a browser has on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import pytest

from benchmarks.studies.newcomer.__main__ import seen, shown, told
from rollout_server.demo.run import model_directory
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server
from trainer_client import RolloutClient


@pytest.fixture(scope="module")
def taught() -> Iterator[LiveServer]:
    with live_server(None) as server, RolloutClient(server.url) as client:
        layers = tiny_models.linear_layers(model_directory())
        for seed in (1, 2):
            client.push("policy", *tiny_models.random_adapter(layers, 4, seed))
        yield server


@contextmanager
def broken(url: str) -> Iterator[str]:
    """The server's page from another address, with a script that fails."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with urlopen(url + self.path) as real:
                body = b"throw new Error()" if self.path.endswith("app.js") else real.read()
                self.send_response(200)
                self.send_header("content-type", real.headers["content-type"])
                self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_page_that_shows_both_versions_is_seen_to(taught: LiveServer) -> None:
    assert sorted(seen(taught.url, 30)) == ["policy@1", "policy@2"]
    assert shown(taught.url).startswith("shows policy@")


def test_a_page_whose_script_fails_shows_nothing(taught: LiveServer) -> None:
    with broken(taught.url) as url:
        assert told(url) == ["policy@1", "policy@2"], "what is told is all there"
        with pytest.raises(SystemExit, match="not both versions"):
            shown(url, patience_s=5)
