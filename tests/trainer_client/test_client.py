"""Both clients over real sockets, against a server of the standard library that answers from a script."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from tests.trainer_client import contract
from trainer_client import (
    AsyncRolloutClient,
    BadReply,
    DigestMismatch,
    Retry,
    Rollout,
    RolloutBatch,
    RolloutClient,
    ServerUnreachable,
    adapter_digest,
)
from trainer_client.adapter.tensors import host_tensors
from trainer_client.errors import AdapterMismatch, QueueFull, Unauthorized

TENSORS = {"q.lora_A.weight": np.ones((2, 600_000), "f4"), "q.lora_B.weight": np.zeros((4, 2), "f4")}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
FAST = Retry(attempts=3, first_delay_s=0.001)


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b"{}"
    headers: tuple[tuple[str, str], ...] = ()
    announced: int | None = None
    """Content-Length to claim, if not the true one."""
    holds: bool = False
    """Sends nothing more, and waits until the client closes."""


HANG_UP = Answer(status=0)
"""Closes the connection without an answer."""


@dataclass
class Seen:
    """What the scripted server was asked, and what it will still answer."""

    url: str
    answers: list[Answer]
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    client_closed: threading.Event = field(default_factory=threading.Event)


@contextmanager
def discarding(*answers: Answer) -> Iterator[Seen]:
    """As `scripted`, but keeps no bodies."""
    with scripted(*answers, keep=False) as seen:
        yield seen


@contextmanager
def scripted(*answers: Answer, keep: bool = True) -> Iterator[Seen]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            left = int(headers.get("content-length", 0))
            body = self.rfile.read(left) if keep else b""
            while not keep and left > 0:
                left -= len(self.rfile.read(min(left, 1 << 16)))
            seen.requests.append((self.command, self.path, headers, body))
            answer = seen.answers.pop(0)
            if answer is HANG_UP:
                self.close_connection = True
                return
            self.send_response(answer.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(answer.announced or len(answer.body)))
            for name, value in answer.headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)
            if answer.holds and self.rfile.read(1) == b"":
                seen.client_closed.set()
            self.close_connection = answer.announced is not None

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen = Seen(f"http://127.0.0.1:{server.server_address[1]}", list(answers))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(body: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(body).encode(), tuple((name.replace("_", "-"), v) for name, v in headers.items()))


def stream(*lines: dict[str, Any]) -> Answer:
    return Answer(body=b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))


FULL = answer(contract.problem(retryable=True), 429, retry_after="0", x_should_retry="true")
UNKNOWN = answer(contract.problem("unknown_policy"), 404)
DONE = {"done": True, "complete": True, "usage": {}}


class Blocking:
    """Calls a verb of `RolloutClient`."""

    def __call__(self, url: str, verb: str, *args: Any, **kwargs: Any) -> Any:
        with RolloutClient(url, retry=FAST, api_key="secret") as client:
            result = getattr(client, verb)(*args, **kwargs)
            return list(result) if verb == "stream_rollouts" else result


class Awaited:
    """Calls a verb of `AsyncRolloutClient`."""

    def __call__(self, url: str, verb: str, *args: Any, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncRolloutClient(url, retry=FAST, api_key="secret") as client:
                result = getattr(client, verb)(*args, **kwargs)
                if verb == "stream_rollouts":
                    return [rollout async for rollout in result]
                return await result

        return asyncio.run(run())


both = pytest.mark.parametrize("ask", [Blocking(), Awaited()], ids=["blocking", "awaited"])


@both
def test_rollouts_travel_as_json_with_the_key(ask: Any) -> None:
    with scripted(answer(contract.rollouts(contract.row(), contract.row(0, 1)))) as seen:
        batch = ask(seen.url, "rollouts", ["2+2="], policy="policy", n=2, max_tokens=8)
    assert isinstance(batch, RolloutBatch)
    assert batch.token_ids.tolist() == [5, 6, 2, 5, 6, 2]
    ((method, path, headers, body),) = seen.requests
    assert (method, path, headers["authorization"]) == ("POST", "/v1/rollouts", "Bearer secret")
    assert (headers["content-type"], headers["content-length"]) == ("application/json", str(len(body)))
    assert json.loads(body)["sampling"] == {"max_tokens": 8}


@both
def test_a_push_arrives_whole_and_is_verified(ask: Any) -> None:
    digest = adapter_digest(host_tensors(TENSORS), CONFIG)
    with scripted(UNKNOWN, answer(contract.published(digest=digest), 201)) as seen:
        version = ask(seen.url, "push", "policy", TENSORS, CONFIG, label="step 1", if_match=6)
    assert version.verified
    (method, path, *_), (_, sent, headers, body) = seen.requests
    assert (method, path) == ("GET", "/v1/weights/policy")
    assert urlsplit(sent).path == "/v1/weights"
    assert parse_qs(urlsplit(sent).query) == {"name": ["policy"], "activate": ["true"], "label": ["step 1"]}
    assert headers["if-match"] == '"6"'
    assert "transfer-encoding" not in headers
    assert int(headers["content-length"]) == len(body) > 4_800_000
    assert body.endswith(TENSORS["q.lora_A.weight"].tobytes() + TENSORS["q.lora_B.weight"].tobytes())


def kept(version: int, digest: str | None, *, live: bool = False, **fields: Any) -> dict[str, Any]:
    return {"version": version, "digest": digest, "live": live, "label": None, "kind": "lora", "mode": "adapter",
            "bytes": 10, **fields}  # fmt: skip


def line(*versions: dict[str, Any]) -> Answer:
    live = next((version["version"] for version in versions if version["live"]), None)
    return answer({"name": "policy", "live": live, "versions": list(versions), "instance": contract.INSTANCE})


OURS = adapter_digest(host_tensors(TENSORS), CONFIG)
THEIRS = contract.OTHER_DIGEST
SENT = answer(contract.published(digest=OURS, version=9), 201)
MOVED = answer({"name": "policy", "version": 8, "digest": OURS, "label": None, "live": True, "unchanged": False,
                "instance": contract.INSTANCE})  # fmt: skip


@both
@pytest.mark.parametrize(
    ("there", "options", "methods", "version", "live"),
    [
        # live already: nothing is left to do
        ((kept(7, OURS, live=True),), {}, ["GET"], 7, True),
        ((kept(7, OURS, live=True), kept(8, THEIRS)), {}, ["GET"], 7, True),
        ((kept(7, OURS, live=True, label="a"),), {"label": "a"}, ["GET"], 7, True),
        # newest: enough if it need not be live, else the name is moved
        ((kept(7, THEIRS, live=True), kept(8, OURS)), {"activate": False}, ["GET"], 8, False),
        ((kept(7, THEIRS, live=True), kept(8, OURS)), {}, ["GET", "POST"], 8, True),
        # what is somewhere else in the list, or something else, is sent
        ((kept(6, OURS), kept(7, THEIRS, live=True)), {}, ["GET", "POST"], 9, True),
        ((kept(6, OURS), kept(7, THEIRS, live=True)), {"activate": False}, ["GET", "POST"], 9, True),
        ((kept(7, OURS, live=True),), {"label": "b"}, ["GET", "POST"], 9, True),
        ((kept(7, OURS, live=True, mode="merged"),), {}, ["GET", "POST"], 9, True),
        ((kept(7, OURS, live=True),), {"mode": "merged"}, ["GET", "POST"], 9, True),
        ((kept(7, OURS, live=True),), {"resend": True}, ["POST"], 9, True),
        ((), {}, ["GET", "POST"], 9, True),
    ],
)
def test_weights_are_sent_only_where_the_server_lacks_them(
    ask: Any, there: Any, options: dict[str, Any], methods: list[str], version: int, live: bool
) -> None:
    answers = [] if options.get("resend") else [line(*there)]
    with scripted(*answers, MOVED if version == 8 else SENT) as seen:
        got = ask(seen.url, "push", "policy", TENSORS, CONFIG, **options)
    assert [method for method, *_ in seen.requests] == methods
    assert (got.version, got.live, got.digest, got.instance, got.verified) == (
        version, live, OURS, contract.INSTANCE, True
    )  # fmt: skip
    assert got.unchanged == (version != 9)
    if version == 8 and live:
        assert (seen.requests[1][1], seen.requests[1][3]) == ("/v1/weights/policy/activate", b'{"version": 8}')
    elif len(methods) == 2:
        assert len(seen.requests[1][3]) > 4_800_000


@both
def test_a_version_freed_since_it_was_looked_at_is_sent_again(ask: Any) -> None:
    gone = answer(contract.problem("version_gone"), 409)
    with scripted(line(kept(7, THEIRS, live=True), kept(8, OURS)), gone, SENT) as seen:
        assert ask(seen.url, "push", "policy", TENSORS, CONFIG).version == 9
    assert [method for method, *_ in seen.requests] == ["GET", "POST", "POST"]


@both
def test_weights_without_a_digest_here_are_sent_without_asking(ask: Any) -> None:
    renamed = {
        "language_model.q.lora_A.weight": np.ones((4, 4), "f4"),
        "language_model.q.lora_B.weight": np.ones((4, 4), "f4"),
    }
    with scripted(answer(contract.published(), 201)) as seen:
        assert not ask(seen.url, "push", "policy", renamed, {"peft_type": "LORA", "r": 4, "lora_alpha": 4}).verified
    assert [method for method, *_ in seen.requests] == ["POST"]


@both
def test_a_push_needs_no_second_copy_of_its_tensors(ask: Any) -> None:
    big = {"q.lora_A.weight": np.ones((64, 400_000), "f4"), "q.lora_B.weight": np.ones((400_000, 64), "f4")}
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 4}
    digest = adapter_digest(host_tensors(big), config)
    with discarding(answer(contract.published(digest=digest), 201)) as seen:
        tracemalloc.start()
        try:
            assert ask(seen.url, "push", "policy", big, config, resend=True).verified
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    size = sum(tensor.nbytes for tensor in big.values())
    assert size > 200_000_000
    assert int(seen.requests[0][2]["content-length"]) > size
    assert peak < 0.1 * size


@both
def test_a_push_that_arrived_as_something_else_is_an_error(ask: Any) -> None:
    with scripted(UNKNOWN, answer(contract.published(), 201)) as seen, pytest.raises(DigestMismatch):
        ask(seen.url, "push", "policy", TENSORS, CONFIG)


@both
def test_a_full_queue_is_tried_again_with_the_whole_body(ask: Any) -> None:
    with scripted(FULL, FULL, answer(contract.rollouts(contract.row()))) as seen:
        assert len(ask(seen.url, "rollouts", [[1, 2]])) == 1
    assert len({body for *_, body in seen.requests}) == 1
    assert len(seen.requests) == 3


@both
def test_trying_again_ends(ask: Any) -> None:
    with scripted(FULL, FULL, FULL) as seen, pytest.raises(QueueFull):
        ask(seen.url, "rollouts", [[1, 2]])


@both
def test_errors_are_raised_by_class_and_not_repeated(ask: Any) -> None:
    mismatch = answer(contract.problem("adapter_mismatch", faults=["a", "b"]), 422, x_should_retry="false")
    with scripted(UNKNOWN, mismatch) as seen, pytest.raises(AdapterMismatch) as caught:
        ask(seen.url, "push", "policy", TENSORS, CONFIG)
    assert caught.value.faults == ("a", "b")
    with scripted(answer(contract.problem("unauthorized"), 401)) as seen, pytest.raises(Unauthorized):
        ask(seen.url, "models")


@both
def test_a_lost_connection_repeats_a_push_but_no_rollouts(ask: Any) -> None:
    digest = adapter_digest(host_tensors(TENSORS), CONFIG)
    with scripted(HANG_UP, UNKNOWN, HANG_UP, answer(contract.published(digest=digest, unchanged=True))) as seen:
        assert ask(seen.url, "push", "policy", TENSORS, CONFIG).unchanged
    assert [method for method, *_ in seen.requests] == ["GET", "GET", "POST", "POST"]
    assert seen.requests[2] == seen.requests[3]
    with scripted(HANG_UP, answer(contract.rollouts())) as seen:
        with pytest.raises(ServerUnreachable, match="was lost before the reply") as caught:
            ask(seen.url, "rollouts", [[1, 2]])
        assert caught.value.sent
        assert len(seen.requests) == 1


@both
def test_half_a_reply_is_no_reply(ask: Any) -> None:
    half = Answer(body=b'{"rollouts": [', announced=1000)
    with scripted(half) as seen, pytest.raises(ServerUnreachable):
        ask(seen.url, "rollouts", [[1, 2]])


@both
def test_nobody_there_is_a_sentence_that_says_what_to_do(ask: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nothing else can take the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for verb in ("models", "health"):
            with pytest.raises(ServerUnreachable, match="rollout-server serve") as caught:
                ask(url, verb)
            assert not caught.value.sent
        with pytest.raises(ServerUnreachable, match=r"not ready within 0\.05 s"):
            ask(url, "wait_ready", 0.05)


@both
def test_health_and_readiness_are_yes_or_no(ask: Any) -> None:
    red = answer(contract.problem("engine_unavailable", retryable=True), 503, x_should_retry="true")
    with scripted(answer({"status": "ok"}), red, red, answer({"status": "ready"})) as seen:
        assert ask(seen.url, "health") is True
        assert ask(seen.url, "ready") is False
        ask(seen.url, "wait_ready")
    assert [path for _, path, *_ in seen.requests] == ["/health", "/ready", "/ready", "/ready"]


@both
def test_a_stream_yields_rows_as_they_come_and_ends_with_its_last_line(ask: Any) -> None:
    with scripted(FULL, stream(contract.row(1, 0, text="a\u2028b"), contract.row(0, 0), DONE)) as seen:
        rows: Sequence[Rollout] = ask(seen.url, "stream_rollouts", [[1], [2]])
    assert [(row.prompt_index, row.text) for row in rows] == [(1, "a\u2028b"), (0, "ab")]
    assert json.loads(seen.requests[-1][3])["stream"] is True
    assert len(RolloutBatch.of(rows).token_ids) == 6


@both
def test_a_stream_that_breaks_off_is_an_error(ask: Any) -> None:
    with scripted(stream(contract.row())) as seen, pytest.raises(BadReply, match="broke off"):
        ask(seen.url, "stream_rollouts", [[1]])
    cut = Answer(body=json.dumps(contract.row()).encode() + b"\n", announced=10_000)
    with scripted(cut) as seen, pytest.raises(ServerUnreachable):
        ask(seen.url, "stream_rollouts", [[1]])
    with scripted(stream(contract.row(), contract.problem("queue_full"))) as seen, pytest.raises(QueueFull):
        ask(seen.url, "stream_rollouts", [[1]])


def test_leaving_a_stream_early_closes_its_connection() -> None:
    endless = Answer(body=json.dumps(contract.row()).encode() + b"\n", announced=10_000_000, holds=True)
    with scripted(endless) as seen, RolloutClient(seen.url) as client:
        rows = client.stream_rollouts([[1]])
        assert next(rows).text == "ab"
        assert not seen.client_closed.is_set()
        rows.close()  # type: ignore[attr-defined]
        assert seen.client_closed.wait(20)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with scripted(answer({"object": "list", "data": []})) as seen, RolloutClient(seen.url) as client:
        assert client.models() == ()


def test_threads_can_share_one_client() -> None:
    count = 16
    with scripted(*[answer(contract.rollouts(contract.row()))] * count) as seen, RolloutClient(seen.url) as client:
        batches: list[RolloutBatch] = []
        threads = [threading.Thread(target=lambda: batches.append(client.rollouts([[1]]))) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(batches) == count
