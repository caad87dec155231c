"""The load generator counts what a server does to it: replies, broken connections, a second reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.servers.load import Drive, drive

REPLY = b'{"usage": {"completion_tokens": 3}}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"


async def serve(answer: Callable[[int, bytes], bytes], work: Callable[[str], Awaitable[Drive]]) -> Drive:
    """Run `work` against a server that sends what `answer` makes of a connection's number and its request's body."""
    number = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        mine, number = number, number + 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        writer.write(answer(mine, await reader.readexactly(length)))
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        return await work(f"http://{host}:{port}")


def drove(answer: Callable[[int, bytes], bytes], requests: int, clients: int) -> Drive:
    bodies = [{"number": number} for number in range(requests)]
    return asyncio.run(serve(answer, lambda url: drive(url, "/x", bodies, clients)))


def test_answers_come_in_the_order_of_the_requests() -> None:
    done = drove(lambda _, body: HEAD % len(body) + body, requests=20, clients=6)
    assert [answer.content()["number"] for answer in done.answers] == list(range(20))


@pytest.mark.parametrize("head", [HEAD % len(REPLY), b"HTTP/1.0 200 OK\r\n\r\n"])
def test_tokens_are_counted_with_and_without_a_length(head: bytes) -> None:
    assert drove(lambda *_: head + REPLY, requests=5, clients=2).tokens() == 15


def test_broken_connections_are_tried_again_and_counted() -> None:
    done = drove(lambda number, _: b"" if number < 3 else HEAD % len(REPLY) + REPLY, requests=2, clients=1)
    assert done.resets == 3
    assert done.tokens() == 6


def test_a_refusal_is_no_throughput() -> None:
    done = drove(lambda *_: b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}", requests=1, clients=1)
    with pytest.raises(RuntimeError, match="503"):
        done.tokens()


def test_a_second_reply_is_found() -> None:
    with pytest.raises(ExceptionGroup) as raised:
        drove(lambda *_: (HEAD % len(REPLY) + REPLY) * 2, requests=1, clients=1)
    assert raised.group_contains(RuntimeError, match="more than one reply")
