"""A small Hugging Face Hub on loopback: what huggingface_hub asks for, answered as the real one does.

Model info and file lists, files by HEAD and GET with ETag, commit and Range, large files by a redirect to another host
name, and its ways to say no: 401 and 404 for what is private or absent, 401 and 403 for what is gated, 401 for a bad
token. A file can be made to break off once.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 2**14
"""Bytes from which a file lives on the other host, as git-lfs files do."""


@dataclass
class Repository:
    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    """Branch or tag → commit; all commits hold the same files."""
    private: bool = False
    gated: bool = False
    breaks: dict[str, int] = field(default_factory=dict)
    """File → after how many bytes its next GET breaks off."""


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    host: str
    range: str | None
    token: str | None


@dataclass
class HubStandIn:
    """`tokens` are valid; those of `admitted` have accepted the terms of what is gated."""

    repositories: dict[str, Repository]
    tokens: set[str] = field(default_factory=set)
    admitted: set[str] = field(default_factory=set)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def got(self, method: str = "GET") -> list[str]:
        """Names of the files asked for."""
        return [ask.path.rpartition("/")[2] for ask in self.asked if ask.method == method and "/api/" not in ask.path]


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def hub_stand_in(hub: HubStandIn) -> Iterator[HubStandIn]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        host = str(self.headers.get("host")).partition(":")[0]
        self.hub.asked.append(Asked(self.command, path, host, self.headers.get("range"), token))
        if found := re.fullmatch(r"/cdn/(.+?)/-/(.+)", path):
            return self.content(found[1], found[2])
        if token is not None and token not in self.hub.tokens:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/(.+)", path):
            return self.described(found[1], found[2], found[3], token)
        if found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            return self.resolved(found[1], found[2], found[3], token)
        return self.refuse(404, "RepoNotFound", "Repository not found")

    def repository(self, name: str, token: str | None) -> Repository | None:
        """None after it was refused. Nobody learns without a token whether a private one is there."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and token is None):
            if token is None:
                self.refuse(401, "RepoNotFound", "Invalid username or password.")
            else:
                self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        return found

    def commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.revisions.get(revision, revision if revision in repository.revisions.values() else None)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def described(self, name: str, what: str, revision: str, token: str | None) -> None:
        """Who has not accepted the terms of a gated model may still see what it is made of."""
        repository = self.repository(name, token)
        if repository is None or (commit := self.commit(repository, revision)) is None:
            return
        if what == "revision":
            siblings = [{"rfilename": path} for path in repository.files]
            self.send({"_id": "1", "id": name, "modelId": name, "sha": commit, "tags": [], "siblings": siblings})
            return
        entries: list[dict[str, Any]] = []
        for path, content in repository.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _sha1(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.send(entries)

    def resolved(self, name: str, revision: str, path: str, token: str | None) -> None:
        repository = self.repository(name, token)
        if repository is None or (commit := self.commit(repository, revision)) is None:
            return
        if repository.gated and token not in self.hub.admitted:
            return self.refuse(401 if token is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        if path not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[path]
        if len(content) < LARGE:
            return self.content(name, path, {"X-Repo-Commit": commit, "ETag": f'"{_sha1(content)}"'})
        linked = {"X-Linked-ETag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        port = urlsplit(self.hub.url).port
        self.send(
            b"", 302, {"X-Repo-Commit": commit, "Location": f"http://localhost:{port}/cdn/{name}/-/{path}"} | linked
        )

    def content(self, name: str, path: str, headers: dict[str, str] | None = None) -> None:
        repository = self.hub.repositories[name]
        content = repository.files[path]
        start = int((self.headers.get("range") or "bytes=0-")[len("bytes=") :].partition("-")[0])
        status = 206 if start else 200
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        until = repository.breaks.pop(path, None) if self.command == "GET" else None
        self.send(content[start:], status, headers, until)

    def refuse(self, status: int, code: str | None, message: str) -> None:
        named = {} if code is None else {"X-Error-Code": code}
        self.send({"error": message}, status, {"X-Error-Message": message, **named})

    def send(
        self, body: object, status: int = 200, headers: dict[str, str] | None = None, until: int | None = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if until is None else data[:until])
        self.close_connection = self.close_connection or until is not None

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing to say."""


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
