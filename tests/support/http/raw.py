"""HTTP by hand: what no client library would send."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SECONDS = 20


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool
    """Whether the server closed the connection after it."""

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def status_code(self) -> int:
        return self.status

    def json(self) -> Any:
        return json.loads(self.body)


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=SECONDS)


def read(connection: socket.socket, *, head: bool = False, wait_s: float = 0.3) -> Reply:
    """One reply with a Content-Length."""
    stream = connection.makefile("rb")
    status = int(stream.readline().split()[1])
    lines = iter(lambda: stream.readline().strip(), b"")
    headers = {k.decode().lower(): v.strip().decode() for k, _, v in (line.partition(b":") for line in lines)}
    body = b"" if head else stream.read(int(headers.get("content-length", 0)))
    connection.settimeout(SECONDS if headers.get("connection") == "close" else wait_s)
    try:
        closed = stream.read(1) == b""
    except TimeoutError:
        closed = False
    return Reply(status, headers, body, closed)


def ask(url: str, sent: bytes, *, head: bool = False) -> Reply:
    with connect(url) as connection:
        connection.sendall(sent)
        return read(connection, head=head)
