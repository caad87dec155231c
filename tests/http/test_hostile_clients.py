"""What a hostile or hurried client meets on every route."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.errors import ContextExceeded, EngineFault
from rollout_server.http.app import create_app
from rollout_server.http.requests import json_body
from rollout_server.http.routes import rollouts
from rollout_server.text import strict_json
from tests.support.http.fake_engine import CONTEXT, FakeEngine
from tests.support.http.fake_versions import BASE_DIGEST
from tests.support.http.fixtures import PEFT_CONFIG

Client = TestClient[Any]
BODY = {"policy": "base", "prompts": [{"token_ids": [5]}], "sampling": {"max_tokens": 2}}


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/weights"])
def test_head_is_get_without_the_body(client: Client, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert head.status_code == whole.status_code == 200 and head.content == b""


def test_compressed_bodies_are_415(client: Client, problem: Callable[..., Any]) -> None:
    json_body = gzip.compress(json.dumps(BODY).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    problem(client.post("/v1/rollouts", content=json_body, headers=headers), 415, "unsupported_media_type")


def test_a_web_page_of_another_site_changes_nothing(
    client: Client, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    error = problem(push(headers={"origin": "http://evil.example"}), 403, "forbidden", "Origin")
    assert "evil.example" in error["message"]
    assert push(headers={"origin": "http://localhost:3000"}).status_code == 201


def test_unknown_query_parameters_are_named(client: Client, problem: Callable[..., Any]) -> None:
    problem(client.post("/v1/rollouts?foo=1", json=BODY), 400, "invalid_field", "foo")


def test_errors_stay_small_whatever_was_sent(client: Client) -> None:
    for change in (
        {"x" * 100_000: 1},
        {"policy": "p" * 100_000},
        {"sampling": {"stop": ["y" * 50_000, ""]}},
        {"sampling": {"temperature": -(10**300)}},
        {"id": "z" * 100_000},
    ):
        response = client.post("/v1/rollouts", json=BODY | change)
        assert response.status_code in (400, 404), response.text
        assert len(response.content) < 1500, response.text[:300]


def test_an_unknown_model_names_the_field_of_its_route(client: Client, problem: Callable[..., Any]) -> None:
    json_body = {"model": "gpt-4", "prompt": [5], "max_tokens": 2}
    problem(client.post("/v1/completions", json=json_body), 404, "unknown_policy", "model")
    problem(client.post("/v1/completions", json=json_body | {"model": "Org/Name"}), 404, "unknown_policy", "model")


def ask(client: Client, path: str = "/v1/rollouts", **change: Any) -> Any:
    json_body = {"model": "base", "prompt": [5], "max_tokens": 2} if path == "/v1/completions" else BODY
    return client.post(path, json=json_body | change)


@pytest.mark.parametrize("method", ["get", "head"])
@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/weights", "/v1/weights/policy"])
def test_routes_without_a_query_take_none(
    client: Client, engine: FakeEngine, path: str, method: str, problem: Callable[..., Any]
) -> None:
    engine.add("policy")
    response = client.request(method, f"{path}?x=1")
    assert response.status_code == 400
    if method == "get":
        problem(response, 400, "invalid_field", "x")


def test_a_route_that_has_get_names_head_too(client: Client, problem: Callable[..., Any]) -> None:
    response = client.post("/v1/models")
    problem(response, 405, "method_not_allowed")
    assert {"GET", "HEAD"} <= set(response.headers["allow"].split(", "))
    assert client.head("/v1/rollouts").status_code == 405


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[bad", "https://localhost.evil.example"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("post", "/v1/weights/policy/activate"), ("patch", "/v1/weights/policy/1"), ("delete", "/v1/weights/policy")],
)
def test_no_state_route_obeys_other_origins(
    client: Client, engine: FakeEngine, method: str, path: str, origin: str, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 2)
    problem(client.request(method, path, headers={"origin": origin}), 403, "forbidden", "Origin")
    assert engine.live("policy").number == 2


def test_an_origin_that_is_this_server_may(client: Client, push: Callable[..., Any]) -> None:
    host = client.base_url.host
    assert push(headers={"origin": f"http://{host}"}).status_code == 201
    assert push(headers={"origin": "http://[::1]:8000"}).status_code == 200


def test_with_a_key_the_origin_does_not_matter(engine: FakeEngine) -> None:
    engine.add("policy", 2)
    with TestClient(create_app(ServerConfig(admin_key="k"), engine)) as client:  # type: ignore[arg-type]
        headers = {"origin": "http://evil.example", "authorization": "Bearer k"}
        response = client.post("/v1/weights/policy/activate", json={"version": 1}, headers=headers)
        assert response.status_code == 200, response.text


def test_a_fault_of_a_pinned_version_does_not_name_the_alias(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 3)
    engine.free("policy", 1)
    for pinned, status, code in (("policy@1", 409, "version_gone"), ("policy@9", 404, "unknown_policy")):
        assert "version" not in problem(ask(client, policy=pinned), status, code, "policy")
    engine.fault = EngineFault("A step failed.")
    assert problem(ask(client, policy="policy"), 500, "engine_fault")["version"] == 3
    assert "version" not in problem(ask(client, policy="policy@2"), 500, "engine_fault")


@pytest.mark.parametrize("name", ["org/other", "two words", ".hidden", "é"])
def test_what_can_be_no_name_is_not_served(
    client: Client, engine: FakeEngine, name: str, problem: Callable[..., Any]
) -> None:
    engine.add("policy")
    for path, field in (("/v1/rollouts", "policy"), ("/v1/completions", "model")):
        error = problem(ask(client, path, **{field: name}), 404, "unknown_policy", field)
        assert "base, org/tiny, policy" in error["message"]


def test_the_base_s_own_id_takes_its_one_version(client: Client, problem: Callable[..., Any]) -> None:
    for address in ("org/tiny@0", f"org/tiny@{BASE_DIGEST}", "base@0"):
        assert ask(client, policy=address).status_code == 200, address
    problem(ask(client, policy="org/tiny@1"), 404, "unknown_policy", "policy")


def test_a_version_has_one_spelling(
    client: Client, engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    engine.add("policy")
    problem(ask(client, policy="policy@001"), 400, "invalid_field", "policy")
    problem(push(headers={"if-match": '"001"'}), 400, "invalid_field", "If-Match")


def test_an_engine_s_fault_names_the_field_of_the_route(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 3)
    engine.free("policy", 1)
    problem(ask(client, "/v1/completions", model="policy@1"), 409, "version_gone", "model")
    problem(ask(client, "/v1/completions", model="nobody", stream=True), 404, "unknown_policy", "model")
    for version, status, code in ((1, 409, "version_gone"), (9, 404, "unknown_policy")):
        response = client.post("/v1/weights/policy/activate", json={"version": version})
        problem(response, status, code, "version")
    engine.refusal = ContextExceeded("One row needs more than there is.", param="max_tokens")
    problem(ask(client), 400, "context_length_exceeded", "sampling.max_tokens")


@pytest.mark.long
def test_a_long_body_is_answered_like_a_short_one(client: Client, problem: Callable[..., Any]) -> None:
    """It is parsed, planned and written on other threads."""
    prompts = [{"text": f"{number}+1=", "id": str(number)} for number in range(1500)]
    reply = ask(client, prompts=prompts).json()
    assert [row["prompt_id"] for row in reply["rollouts"]] == [prompt["id"] for prompt in prompts]
    texts = [prompt["text"] for prompt in prompts] * 3
    assert len(ask(client, "/v1/completions", prompt=texts).json()["choices"]) == len(texts)
    prompts[1400]["text"] = ""
    problem(ask(client, prompts=prompts), 400, "invalid_field", "prompts[1400].text")
    ids = [5] * 30_000
    ids[29_000] = 10**6
    problem(ask(client, prompts=[{"token_ids": ids}]), 400, "invalid_field", "prompts[0].token_ids[29000]")
    problem(ask(client, prompts=[{"token_ids": [-1] * 60_000}]), 400, "invalid_field", "prompts[0].token_ids[0]")


def test_the_loop_goes_on_while_a_long_body_is_worked_on(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither parsing nor planning nor writing of what is long happens on the event loop's thread."""
    seen: dict[str, bool] = {}

    def watched(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                asyncio.get_running_loop()
                seen[name] = True
            except RuntimeError:
                seen[name] = False
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watched(json_body, "parse_json")
    watched(rollouts, "plan")
    watched(rollouts, "reply")
    assert ask(client).status_code == 200
    assert seen == {"parse_json": True, "plan": True, "reply": True}
    assert ask(client, prompts=[{"text": "1+1="}] * 3000).status_code == 200
    assert seen == {"parse_json": False, "plan": False, "reply": False}


def test_the_deadline_counts_from_the_arrival(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    plain = strict_json.parse_json
    at: list[float] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        at.append(time.monotonic())
        return plain(*args, **kwargs)

    monkeypatch.setattr(json_body, "parse_json", slow)
    assert ask(client, timeout_s=100).status_code == 200
    deadline = engine.submitted[-1][2]
    assert deadline is not None and began + 100 <= deadline < at[0] + 100 - 0.04


def test_a_path_cannot_write_a_line_of_the_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rollout_server.access"):
        client.get("/v1/a%0aGET%20/v1/models%20200%1b%5b2J" + "x" * 5000)
    (record,) = caplog.records
    assert record.getMessage().startswith("GET /v1/a\\nGET /v1/models 200\\x1b[2J")
    assert len(record.getMessage()) < 300 and record.getMessage().isprintable()


@pytest.mark.parametrize("label", ["a\nb", "a\x1b[2J", "a\u2028b", "a\u202eb"])
def test_a_label_is_one_printable_line(push: Callable[..., Any], label: str, problem: Callable[..., Any]) -> None:
    problem(push(label=label), 400, "invalid_field", "label")


def test_a_part_without_a_name(client: Client, adapter: Callable[..., bytes], problem: Callable[..., Any]) -> None:
    part = b"--xyz\r\nContent-Disposition: form-data%s\r\n\r\nx\r\n--xyz--\r\n"
    for name in (b"", b'; name=""'):
        headers = {"content-type": "multipart/form-data; boundary=xyz"}
        problem(client.post("/v1/weights", content=part % name, headers=headers), 400, "bad_body")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"config": PEFT_CONFIG | {"r": 0}}, 422, "config.r"),
        ({"config": PEFT_CONFIG | {"target_modules": None}}, 422, "config.target_modules"),
        ({"config": PEFT_CONFIG | {"target_modules": "("}}, 422, "config"),
        ({"config": PEFT_CONFIG | {"lora_parameters": {}}}, 422, "config"),
        ({"config": None}, 422, "config"),
        ({"format": "mlx"}, 422, "format"),
        ({"weights": b"junk"}, 422, "weights"),
        ({"config": b""}, 400, "config"),
        ({"config": b"{"}, 400, "config"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_named(
    push: Callable[..., Any], fields: dict[str, Any], status: int, param: str, problem: Callable[..., Any]
) -> None:
    error = problem(push(**fields), status, "adapter_invalid" if status == 422 else "bad_body", param)
    assert status == 422 or error["message"].startswith("config is "), error


def test_an_id_in_the_header_is_checked_on_logprobs_too(client: Client, problem: Callable[..., Any]) -> None:
    scored = {"policy": "base", "sequences": [{"token_ids": [5]}]}
    response = client.post("/v1/logprobs", json=scored, headers={"x-request-id": "a b"})
    problem(response, 400, "invalid_field", "X-Request-Id")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompts": [{"token_ids": [5], "max_tokens": 0}]}, "prompts[0].max_tokens"),
        ({"prompts": [{"token_ids": [5]}, {"token_ids": [5], "max_tokens": 1000}]}, "prompts[1].max_tokens"),
        (
            {"prompts": [{"token_ids": [5], "max_tokens": 2}], "sampling": {"min_tokens": 3}},
            "prompts[0].max_tokens",
        ),
        ({"prompts": [{"token_ids": [5]}, {"token_ids": [5], "n": 70_000}]}, "prompts[1].n"),
        ({"n": 70_000}, "n"),
        *(
            ({"prompts": [{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: 1}}]}, field)
            for name in ("self", "tokenize", "messages", "conversation", "chat_template", "add_generation_prompt")
            for field in ("prompts[0].chat_template_kwargs",)
        ),
    ],
)
def test_faults_of_one_prompt_name_it(
    client: Client, change: dict[str, Any], param: str, problem: Callable[..., Any]
) -> None:
    response = ask(client, **change)
    code = "context_length_exceeded" if "1000" in response.text else "invalid_field"
    assert param.split(".")[-1] in problem(response, 400, code, param)["message"] or param == "n"


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("/v1/completions", {"prompt": 5}, "prompt must be a string, a list of strings, a list of token ids or"),
        ("/v1/completions", {"stop": ""}, "stop must not be empty."),
        ("/v1/completions", {"stop": 5}, "stop must be a string or a list of strings."),
        ("/v1/completions", {"n": "2"}, "n must be a whole number, not '2'."),
        ("/v1/completions", {"n": 0}, "n must be at least 1, not 0."),
        ("/v1/completions", {"echo": 1}, "echo must be true or false, not 1."),
        ("/v1/completions", {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens is above 0, but with"),
        ("/v1/rollouts", {"sampling": {"top_p": 2.0}}, "sampling.top_p must be above 0 and at most 1, not 2.0."),
        ("/v1/rollouts", {"sampling": []}, "sampling must be an object, not a list."),
        ("/v1/rollouts", {"sampling": {"response_format": {}}}, "sampling.response_format.type is required."),
        (
            "/v1/rollouts",
            {"sampling": {"structured_outputs": {}}},
            "sampling.structured_outputs must have one of json,",
        ),
        ("/v1/rollouts", {"prompts": [{}]}, "prompts[0] must have one of token_ids, text and messages; this one has"),
        ("/v1/rollouts", {"prompts": [{"token_ids": [5] * 600}]}, "prompts[0] has 600 tokens; the context holds 512"),
        ("/v1/rollouts", {"colour": 1}, "colour is an unknown field."),
        ("/v1/rollouts", {"id": "a b"}, "id must be 1 to 128 printable ASCII characters without spaces and slashes."),
    ],
)
def test_sentences_are_our_own(client: Client, path: str, change: dict[str, Any], message: str) -> None:
    response = ask(client, path, **change)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(message), response.text


def test_the_limit_of_a_body_is_told(client: Client, problem: Callable[..., Any]) -> None:
    error = problem(ask(client, id="x" * 300_000), 413, "body_too_large")
    assert "200000" in error["message"] and "--max-body" in error["message"]


def test_a_client_that_leaves_while_sending_is_no_fault_of_the_server(
    engine: FakeEngine, config: ServerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(config, engine)  # type: ignore[arg-type]
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def leave() -> None:
        async with app.lifespan():
            scope = {"type": "http", "method": "POST", "path": "/v1/rollouts", "query_string": b"", "root_path": ""}
            headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
            await app({**scope, "headers": headers, "scheme": "http"}, receive, send)  # type: ignore[arg-type]

    asyncio.run(leave())
    assert sent[0]["status"] == 400
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_context_longer_than_the_model_s_is_refused_at_the_start(
    engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    with TestClient(create_app(ServerConfig(context_length=CONTEXT + 1), engine)) as client:  # type: ignore[arg-type]
        while "still being loaded" in (response := client.get("/ready")).text:
            pass
        error = problem(response, 503, "engine_unavailable")
        assert "--context-length" in error["message"] and str(CONTEXT) in error["message"]


def test_the_schema_has_the_contract_s_names(client: Client) -> None:
    schemas = client.get("/schema/openapi.json").json()["components"]["schemas"]
    assert {"receive", "validate", "stage", "activate"} <= set(schemas["PushTimings"]["properties"])
