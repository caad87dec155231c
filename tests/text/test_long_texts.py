"""Texts far beyond the context are refused before they are tokenized to their end; what may fit is read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout_server.config import ServerConfig
from rollout_server.errors import ContextExceeded
from rollout_server.http.routes.vllm.tokenizer import MOST_CHARACTERS
from rollout_server.text.long_texts import DOUBLE, PIECE, SEAM, ContextBound
from tests.laws.grids import corners
from tests.support.http.fake_engine import FakeEngine
from tests.support.http.shared_routes import make_app

Client = TestClient[Any]


class Counting:
    """A tokenizer, and how many characters it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> Any:
        self.read += len(text)
        return self._tokenizer.encode(text, **options)


@pytest.fixture
def engine(tokenizer: Any) -> FakeEngine:
    return FakeEngine(Counting(tokenizer))


@pytest.fixture
def client(engine: FakeEngine) -> Any:
    with TestClient(make_app(ServerConfig(max_body=20_000_000), engine)) as client:  # type: ignore[arg-type]
        yield client


TEXTS = {"words": "the hat ", "one word": "x", "lines": "\n", "characters of several bytes": "é", "digits": "7"}


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ROUTES: dict[str, tuple[str, Callable[[str], dict[str, Any]], str]] = {
    "completions": ("/v1/completions", lambda text: {"model": "base", "prompt": text}, "prompt"),
    "completions of several": ("/v1/completions", lambda text: {"model": "base", "prompt": ["a", text]}, "prompt[1]"),
    "chat": ("/v1/chat/completions", lambda text: {"model": "base", "messages": message(text)}, "messages"),
    "a text": ("/v1/rollouts", lambda text: {"policy": "base", "prompts": [{"text": text}]}, "prompts[0]"),
    "messages": (
        "/v1/rollouts",
        lambda text: {"policy": "base", "prompts": [{"text": "a"}, {"messages": message(text)}]},
        "prompts[1]",
    ),
    "embeddings": ("/v1/embeddings", lambda text: {"model": "base", "input": [text]}, "input[0]"),
}


@pytest.mark.parametrize(("route", "words"), corners(list(ROUTES), list(TEXTS)))
def test_a_text_far_beyond_the_context_is_not_read_to_its_end(
    route: str, words: str, client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    path, body, param = ROUTES[route]
    context = engine.info.max_model_len
    text = TEXTS[words] * (4_000_000 // len(TEXTS[words]))
    error = problem(client.post(path, json=body(text)), 400, "context_length_exceeded", param)
    assert f"the context holds {context}" in error["message"] and len(error["message"]) < 200
    # No token of this tokenizer has more than 16 characters.
    assert engine.tokenizer.read < 16 * (DOUBLE * context + SEAM) + 2 * PIECE
    assert not engine.submitted


@pytest.mark.parametrize("route", ROUTES)
def test_the_first_text_that_does_not_fit_ends_it(
    route: str, client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    """However little it is beyond, its neighbours are not read."""
    context = engine.info.max_model_len
    long = "7" * (context + 1)
    path, body, param = ROUTES[route]
    problem(client.post(path, json=body(long)), 400, "context_length_exceeded", param)
    several = {"model": "base", "input" if route == "embeddings" else "prompt": [long] * 1000}
    engine.tokenizer.read = 0
    path = "/v1/embeddings" if route == "embeddings" else "/v1/completions"
    problem(client.post(path, json=several), 400, "context_length_exceeded")
    assert engine.tokenizer.read <= 2 * len(long)


@pytest.mark.parametrize(
    ("path", "field", "param"), [("/v1/completions", "prompt", "n"), ("/v1/embeddings", "input", "input")]
)
def test_more_texts_than_a_request_may_have_are_counted_and_not_read(
    path: str, field: str, param: str, client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    """Each of them is short, and all of them take minutes."""
    texts = ["a"] * (ServerConfig().max_rows_per_request + 1)
    error = problem(client.post(path, json={"model": "base", field: texts}), 400, "invalid_field", param)
    assert str(len(texts)) in error["message"] and engine.tokenizer.read == 0


def test_what_is_only_counted_is_bounded_by_its_characters(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    long = "x" * (MOST_CHARACTERS + 1)
    for body, param in (({"prompt": long}, "prompt"), ({"messages": message(long)}, "messages")):
        error = problem(client.post("/tokenize", json=body), 400, "invalid_field", param)
        assert str(MOST_CHARACTERS) in error["message"]
    assert engine.tokenizer.read == 0
    counted = client.post("/tokenize", json={"prompt": "7" * 40_000})
    assert counted.json()["count"] == 40_000 > engine.info.max_model_len


def shrinking(**parts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that reads much text as little."""
    made = Tokenizer(models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?", fuse_unk=True))
    for name, part in parts.items():
        setattr(made, name, part)
    made.add_tokens([AddedToken("[ab]", lstrip=True, rstrip=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"normalizer": normalizers.Replace(Regex(r"\s+"), "")}, "a" + " " * 1_000_000),
        (
            {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])},
            "a" + "\u0301" * 900_000,
        ),
        ({"normalizer": normalizers.BertNormalizer()}, "a" + "\x07" * 900_000),
        ({"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}, "a" + "\n \t" * 300_000),
        ({}, "a" + "x" * 1_000_000),
        ({"normalizer": normalizers.NFC()}, "a" + "e\u0301" * 400_000),
    ],
    ids=["regex", "accents", "control characters", "white space", "unknown characters", "composition"],
)
def test_what_a_tokenizer_makes_little_of_is_not_refused(parts: dict[str, Any], text: str) -> None:
    tokenizer = shrinking(**parts)
    ContextBound(200).check(tokenizer, text, "prompt")
    assert len(tokenizer.encode(text, add_special_tokens=False)) <= 200
    with pytest.raises(ContextExceeded):
        ContextBound(200).check(tokenizer, text + "ab" * 100_000, "prompt")


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/rollouts", "/v1/embeddings"])
def test_nothing_more_is_read_for_a_client_that_left(route: str, client: Client, engine: FakeEngine) -> None:
    """It leaves while the second of many texts is read; each of them would fit."""
    texts = [f"{at:400d}" for at in range(1000)]
    body = {
        "/v1/completions": {"model": "base", "prompt": texts},
        "/v1/rollouts": {"policy": "base", "prompts": [{"text": text} for text in texts]},
        "/v1/embeddings": {"model": "base", "input": texts},
    }[route]
    reading, gone, read = threading.Event(), threading.Event(), list[str]()

    def watched(text: str, encode: Any = engine.tokenizer.encode, **options: Any) -> Any:
        read.append(text)
        if len(read) == 2:
            reading.set()
            gone.wait(60)
        return encode(text, **options)

    engine.tokenizer.encode = watched
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.to_thread(reading.wait, 60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        """The reply that nobody gets."""
        gone.set()

    assert client.blocking_portal is not None
    client.blocking_portal.call(client.app, scope_of(route), receive, send)
    assert len(read) == 2


def scope_of(route: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": route,
        "raw_path": route.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
