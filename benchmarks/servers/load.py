"""The load generator: POST requests over raw sockets, a connection for each, so that it costs both servers the same."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MOST_RESETS = 50
BETWEEN_RESETS_S = 0.05


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply. `seconds` from the first attempt to connect to the last byte; `resets`: connections that broke."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    resets: int

    def content(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Drive:
    """The replies to one load, in the order of the requests, and how long all of it took."""

    answers: tuple[Answer, ...]
    seconds: float

    @property
    def resets(self) -> int:
        return sum(answer.resets for answer in self.answers)

    def tokens(self) -> int:
        """Completion tokens by each reply's own count. Raises RuntimeError where a request failed."""
        for answer in self.answers:
            if answer.status != 200:
                raise RuntimeError(f"A request failed with {answer.status}: {answer.body[:300]!r}")
        return sum(answer.content()["usage"]["completion_tokens"] for answer in self.answers)


async def post(url: str, path: str, body: bytes) -> Answer:
    """Send one request. A connection that breaks before the whole reply is tried again, and counted.
    Raises ConnectionError after too many."""
    began, resets = time.perf_counter(), 0
    while True:
        try:
            status, headers, reply = await _exchange(url, path, body)
            return Answer(status, headers, reply, time.perf_counter() - began, resets)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            resets += 1
            if resets > MOST_RESETS:
                raise ConnectionError(f"{url}{path} broke {resets} connections of one request.") from error
            await asyncio.sleep(BETWEEN_RESETS_S)


async def _exchange(url: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
        length = headers.get("content-length")
        reply = await (reader.read() if length is None else reader.readexactly(int(length)))
        if length is not None and await reader.read():
            raise RuntimeError(f"{url}{path} sent more than one reply.")
        return int(lines[0].split()[1]), headers, reply
    finally:
        writer.close()


async def drive(
    url: str, path: str, requests: Iterable[dict[str, Any]], clients: int, *, apart_s: float = 0.0
) -> Drive:
    """Send all requests from `clients` clients, each with one request open; each takes the next when it is answered.
    `apart_s` lies between two of them, for a server that lets only a few connections wait to be accepted."""
    bodies = [json.dumps(request).encode() for request in requests]
    waiting = iter(enumerate(bodies))
    answers: dict[int, Answer] = {}
    gate = asyncio.Lock()

    async def client() -> None:
        for index, body in waiting:
            if apart_s:
                async with gate:
                    await asyncio.sleep(apart_s)
            answers[index] = await post(url, path, body)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(client())
    seconds = time.perf_counter() - began
    return Drive(tuple(answers[index] for index in range(len(bodies))), seconds)
