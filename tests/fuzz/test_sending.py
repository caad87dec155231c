"""The same mutated uploads, and broken forms and queries around them, sent to a real server in both encodings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.uploads import Originals, Upload, packed, uploads, valid_uploads
from tests.support import tiny_models
from tests.support.live_server import LiveServer, live_server

BOUNDARY = "b0undary"
OPTIONS = (
    *({}, {}, {}, {"activate": "false"}, {"format": "peft"}, {"format": "mlx"}, {"label": "step"}, {"label": "\n"}),
    *({"mode": "merged"}, {"activate": "yes"}, {"colour": "red"}, {"name": ""}, {"name": "base"}, {"name": "é"}),
    *({"name": "x" * 65}, {"label": "x" * 5000}, {"dequantize": "true"}, {"name": "\ud800"}, {"format": "\x00"}),
)
PROMPTS = {"policy": "kept", "prompts": [{"token_ids": [5, 9, 33], "seed": 1}], "sampling": {"max_tokens": 8}}
Sent = tuple[dict[str, str], str, bytes]
"""Headers, query and body."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("fuzz") / "tiny", num_hidden_layers=2)


def part(name: str, content: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return head.encode("utf-8", "surrogatepass") + content + b"\r\n"


@st.composite
def requests(draw: Callable[[st.SearchStrategy[Any]], Any], valid: Originals) -> Sent:
    _, upload, in_metadata = draw(uploads(valid))
    options = {"name": "fuzz"} | draw(st.sampled_from(OPTIONS))
    if draw(st.booleans()):
        return as_form(draw, upload, in_metadata, options)
    # A query longer than 64 kB is refused by any server.
    in_metadata = in_metadata or len(upload.config_bytes) > 8000
    if not in_metadata:
        options["config"] = upload.config_bytes.decode("utf-8", "replace")
    query = urlencode({name: value.encode("utf-8", "surrogatepass") for name, value in options.items()})
    query += draw(st.sampled_from(("", "", "", "", "&name=again", "&%ff=%fe", "&=", "&config=%7b%7d")))
    return {"content-type": "application/octet-stream"}, query, upload.file(with_config=in_metadata)


def as_form(
    draw: Callable[[st.SearchStrategy[Any]], Any], upload: Upload, in_metadata: bool, options: dict[str, str]
) -> Sent:
    parts = [part(name, value.encode("utf-8", "surrogatepass")) for name, value in options.items()]
    parts.append(part("weights", upload.file(with_config=in_metadata)))
    if not in_metadata:
        parts.append(part("config", upload.config_bytes))
    body, type = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"
    match draw(st.sampled_from(("",) * 8 + ("cut", "flip", "boundary", "twice", "many", "type", "strange", "query"))):
        case "cut":
            body = body[: int(len(body) * draw(st.floats(0, 1)))]
        case "flip":
            place = draw(st.integers(0, min(len(body), 400) - 1))
            body = body[:place] + bytes([body[place] ^ (1 << draw(st.integers(0, 7)))]) + body[place + 1 :]
        case "boundary":
            type = f"multipart/form-data; boundary={draw(st.sampled_from(('x', '', '-' * 500, chr(34))))}"
        case "twice":
            body = parts[-1] + body
        case "many":
            body = part("label", b"x") * 40 + body
        case "type":
            type = draw(st.sampled_from(("text/plain", "", "multipart/form-data", "application/json", "x" * 5000)))
        case "strange":
            body = part(draw(st.sampled_from(("", "\ud800", "x" * 9000, "config\r\n"))), b"\xff") + body
        case "query":
            return {"content-type": type}, "name=fuzz", body
    return {"content-type": type}, "", body


def check_reply(response: httpx.Response) -> str:
    if response.status_code in (200, 201):
        return "served"
    assert 400 <= response.status_code < 500, response.text[:2000]
    error = response.json()["error"]
    assert error["message"].strip() == error["message"] and error["message"][-1] in ".!?…", error
    assert error["retryable"] is False and error["code"] and error["type"]
    return str(error["code"])


def state_of(client: httpx.Client) -> dict[str, Any]:
    """What must not change; a version's share of the stacks does, with the ranks and slots of its neighbours."""
    state: dict[str, Any] = client.get("/v1/weights/kept").json()
    for version in state["versions"]:
        del version["resident_bytes"]
    return state


@pytest.mark.long
def test_a_server_outlives_every_upload_and_serves_what_it_served(model: Path) -> None:
    layers = tiny_models.linear_layers(model)
    kept = packed(*tiny_models.random_adapter(layers, 4, 7))
    seen: Counter[str] = Counter()
    with live_server(model, "--keep-versions", "2") as live, httpx.Client(base_url=live.url, timeout=60) as client:

        def send(request: Sent) -> httpx.Response:
            headers, query, body = request
            return client.post(f"/v1/weights?{query}" if query else "/v1/weights", content=body, headers=headers)

        assert send(({"content-type": "application/octet-stream"}, "name=kept", kept.file(with_config=True))).is_success
        state, rows = (lambda: state_of(client)), (lambda: tokens_of(client))
        before = state(), rows()

        @settings(max_examples=4 * settings().max_examples)
        @given(requests(valid_uploads({"plain": layers})))
        def one(request: Sent) -> None:
            seen[check_reply(send(request))] += 1
            assert state() == before[0]

        one()
        assert rows() == before[1]
        assert_alive(live)
    assert seen.total() >= 300
    assert {"served", "adapter_invalid", "adapter_mismatch", "bad_body", "invalid_field"} <= seen.keys(), seen


def tokens_of(client: httpx.Client) -> Any:
    (row,) = client.post("/v1/rollouts", json=PROMPTS).raise_for_status().json()["rollouts"]
    return row["token_ids"], row["logprobs"], row["versions"]


def assert_alive(live: LiveServer) -> None:
    assert live.process.poll() is None
    unforeseen = [line for line in live.log if "Traceback" in line or "Unhandled exception" in line]
    assert not unforeseen, unforeseen
