"""What a URL of a picture may be, and what is looked at of it before anything is decoded."""

from __future__ import annotations

import base64
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from rollout_server.config import ServerConfig
from rollout_server.errors import InvalidField
from rollout_server.http.requests.tokens.picture_urls import bytes_of

CONFIG = ServerConfig(max_picture_bytes=100)


def given(url: str) -> bytes:
    return bytes_of(url, "images[0]", CONFIG)


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/PNG", "application/octet-stream", "image/png;charset=x", ""])
def test_data_urls_hold_their_bytes(kind: str) -> None:
    for size in (1, 2, 3, 98, 99, 100):
        content = bytes(range(size))
        assert given(f"data:{kind};base64,{base64.b64encode(content).decode()}") == content
    assert given(f"DATA:{kind},%00%ffa") == b"\0\xffa"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "nothing on this machine is opened"),
        ("x", "nothing on this machine is opened"),
        ("data:", "comma"),
        ("data:text/html,hi", "text/html"),
        ("data:audio/wav;base64,AAAA", "audio/wav"),
        ("data:image/png;base64,AAA", "not base64"),
        ("data:image/png;base64,A\nAA", "not base64"),
        ("data:image/png,", "no bytes"),
        (f"data:image/png;base64,{base64.b64encode(bytes(101)).decode()}", "--max-picture-bytes"),
        (f"data:image/png,{'%00' * 101}", "--max-picture-bytes"),
        (f"data:image/png,{'a' * 101}", "--max-picture-bytes"),
        (f"data:image/png;base64,{'@' * 10**6}", "--max-picture-bytes"),
        ("http://localhost/it.png", "--allow-image-host"),
        ("https://user@localhost:1/it.png", "--allow-image-host"),
        ("http://", "--allow-image-host"),
        ("http://[", "--allow-image-host"),
    ],
)
def test_what_is_no_picture_is_said_by_its_place(url: str, said: str) -> None:
    with pytest.raises(InvalidField, match=r"^images\[0\]") as caught:
        given(url)
    assert said in caught.value.message and caught.value.param == "images[0]"
    assert len(caught.value.message) < 400


def test_hosts_are_allowed_by_their_whole_name() -> None:
    config = ServerConfig(allow_image_host=("example.com",))
    for url in ("http://example.com.evil.org/a", "http://evil.org/?example.com", "http://example.com@evil.org/a"):
        with pytest.raises(InvalidField, match="--allow-image-host"):
            bytes_of(url, "images[0]", config)


class _Dripping(BaseHTTPRequestHandler):
    """Gives a byte now and then, for longer than anybody waits."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_a_host_that_drips_is_not_waited_for() -> None:
    config = ServerConfig(allow_image_host=("127.0.0.1",), max_picture_bytes=10**9)
    with HTTPServer(("127.0.0.1", 0), _Dripping) as host:
        thread = Thread(target=host.serve_forever, daemon=True)
        thread.start()
        with pytest.raises(InvalidField, match=r"images\[0\] could not be fetched from 127.0.0.1 \(it took more than"):
            bytes_of(f"http://127.0.0.1:{host.server_port}/drip", "images[0]", config, within_s=0.3)
        host.shutdown()
        thread.join()
