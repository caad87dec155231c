"""A body's pieces pass through h11 and uvicorn as they came, and all else is read as h11 reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import h11
import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from rollout_server.http.server import served
from rollout_server.http.sockets.received import WHOLE, WholePieces
from tests.support.http.fake_engine import LAYERS, FakeEngine
from trainer_client.client import RolloutClient

LONG = bytes(range(256)) * 512
HEAD = b"POST /v1/weights HTTP/1.1\r\nhost: a\r\n"


def announced(body: bytes) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(*pieces: bytes) -> bytes:
    return (
        HEAD
        + b"transfer-encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    )


SENT = {
    "one body": announced(LONG),
    "two requests": announced(LONG) + announced(b"short"),
    "a body and more than it": announced(LONG[:-100]) + LONG,
    "an empty body": announced(b"") + announced(LONG),
    "chunks": chunked(LONG, b"a", LONG[:WHOLE]),
    "no request": LONG,
    "TLS": b"\x16\x03\x01" + LONG,
    "a head without an end": b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 200_000,
    "blank lines": b"\r\n" * 40_000,
    "a broken chunk": HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + LONG,
}


def connection(*, whole: bool) -> h11.Connection:
    made = h11.Connection(h11.SERVER, 65_536)
    if whole:
        made._receive_buffer = WholePieces()
    return made


def read(made: h11.Connection, pieces: list[bytes]) -> list[object]:
    """What a server does with the events, each long run of a body joined; an error ends it."""
    seen: list[object] = []
    try:
        for piece in pieces:
            made.receive_data(piece)
            while (event := made.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if not isinstance(event, h11.Data):
                    seen.append(event)
                elif seen and isinstance(seen[-1], bytes):
                    seen[-1] += bytes(event.data)
                else:
                    seen.append(bytes(event.data))
                if isinstance(event, h11.EndOfMessage):
                    made.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                    made.send(h11.EndOfMessage())
                    made.start_next_cycle()
    except h11.RemoteProtocolError as error:
        seen.append(str(error))
    return [*seen, made.trailing_data]


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
@pytest.mark.parametrize("seed", range(4))
def test_events_are_those_of_h11_however_the_bytes_are_cut(sent: bytes, seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = [1, 100, WHOLE - 1, WHOLE, 4 * WHOLE] if seed else [len(sent)]
    pieces, at = [], 0
    while at < len(sent):
        size = int(random.choice(sizes)) if at > 300 or not seed else int(random.choice(sizes[:2]))
        pieces.append(sent[at : at + size])
        at += size
    assert read(connection(whole=True), pieces) == read(connection(whole=False), pieces)


def test_a_piece_within_a_body_is_given_away_as_it_came() -> None:
    made = connection(whole=True)
    made.receive_data(announced(4 * LONG)[: -4 * len(LONG)])
    assert isinstance(made.next_event(), h11.Request)
    for number in range(4):
        piece = LONG[:-1] + bytes([number])
        made.receive_data(piece)
        event = made.next_event()
        assert isinstance(event, h11.Data) and event.data is piece
        assert number == 3 or made.next_event() is h11.NEED_DATA
    assert isinstance(made.next_event(), h11.EndOfMessage)


# ---- over a real socket -------------------------------------------------------------------------------------------

RANK = 150_000
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def url(tokenizer: Any) -> Iterator[str]:
    config = ServerConfig(port=0, max_upload=20_000_000)
    with served(config, lambda config: create_app(config, FakeEngine(tokenizer))) as url:  # type: ignore[arg-type]
        yield url


def adapter(seed: int) -> dict[str, np.ndarray]:
    """Six megabytes."""
    random, path = np.random.default_rng(seed), "model.layers.0.self_attn.q_proj"
    out, width = LAYERS[path]
    shapes = {"lora_A": (RANK, width), "lora_B": (out, RANK)}
    return {f"base_model.model.{path}.{h}.weight": random.normal(size=s).astype(np.float32) for h, s in shapes.items()}


def pieces(content: bytes, seed: int) -> Iterator[bytes]:
    random, at = np.random.default_rng(seed), 0
    while at < len(content):
        size = int(random.choice([1, 1000, WHOLE, 300_000, 3_000_000]))
        yield content[at : at + size]
        at += size


def test_megabytes_arrive_as_they_were_sent_however_they_are_sent(url: str) -> None:
    """All over one connection, with small requests between them: each digest is the one that the client computed."""
    with RolloutClient(url) as trainer, httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for seed in range(3):
            tensors = adapter(seed)
            sent = trainer.push(f"of-client-{seed}", tensors, CONFIG)
            assert sent.verified
            content, query = save(tensors), {"name": f"raw-{seed}", "config": json.dumps(CONFIG)}
            form = {"name": f"form-{seed}", "config": json.dumps(CONFIG)}
            stream = {"content-type": "application/octet-stream"}
            length = {"content-length": str(len(content))}
            for reply in (
                client.post("/v1/weights", params=query, headers=stream, content=content),
                client.post("/v1/weights", params=query, headers=stream, content=pieces(content, seed)),
                client.post("/v1/weights", params=query, headers=stream | length, content=pieces(content, seed)),
                client.post("/v1/weights", data=form, files={"weights": content}),
            ):
                assert reply.json()["digest"] == sent.digest, reply.text
                assert client.get("/health").status_code == 200


def test_a_body_of_megabytes_that_is_too_long_is_refused_by_its_sentence(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        stream = {"content-type": "application/octet-stream"}
        endless = (bytes(1 << 20) for _ in range(40))
        reply = client.post("/v1/weights", params={"name": "p"}, headers=stream, content=endless)
        assert reply.status_code == 413 and "--max-upload" in reply.json()["error"]["message"]
        assert client.get("/health").status_code == 200
