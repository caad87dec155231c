"""Every bad input of the issue gets its clear 4xx; the server goes on and the live version stays."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from tests.http.fake_engine import CONTEXT, LAYERS, VOCABULARY, FakeEngine

Client = TestClient[Any]
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> FakeEngine:
    """One for the whole file: nothing here may change it."""
    engine = FakeEngine(tokenizer)
    engine.add("policy", 2)
    return engine


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[Client]:
    config = ServerConfig(max_body=200_000, max_upload=100_000)
    with TestClient(create_app(config, engine)) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture(autouse=True)
def unharmed(client: Client) -> Iterator[None]:
    """Around every test here: the live version still is afterwards, and rollouts go on."""
    yield
    body = {"policy": "policy", "prompts": [{"token_ids": [1]}]}
    after = client.post("/v1/rollouts", json=body)
    assert after.status_code == 200
    assert after.json()["rollouts"][0]["versions"][0]["version"] == 2
    assert [version["version"] for version in client.get("/v1/weights/policy").json()["versions"]] == [1, 2]


# ---- weights ------------------------------------------------------------------------------------------------------


def test_truncated_safetensors(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    for length in (4, 60, len(adapter()) - 1):
        problem(push(weights=adapter()[:length]), 422, "adapter_invalid")


def test_a_pickle_renamed(push: Callable[..., Any], problem: Any) -> None:
    problem(push(weights=pickle.dumps({"lora_A": [1.0]})), 422, "adapter_invalid")


def test_a_header_of_two_gigabytes(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    problem(push(weights=(2 * 2**30).to_bytes(8, "little") + adapter()[8:]), 422, "adapter_invalid")


def test_wrong_shapes_are_all_listed(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    changes = {
        f"{PREFIX}{Q_PROJ}.lora_A.weight": np.zeros((4, 2), np.float32),
        f"{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight": np.zeros((5, 2), np.float32),
    }
    error = problem(push(weights=adapter(**changes)), 422, "adapter_mismatch")
    assert len(error["faults"]) == 2
    assert all(fault in error["message"] for fault in error["faults"])


def test_half_of_the_tensors_missing(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    missing = {f"{PREFIX}{path}.lora_B.weight": None for path in LAYERS}
    error = problem(push(weights=adapter(**missing)), 422, "adapter_mismatch")
    assert len(error["faults"]) == len(LAYERS)


def test_tensors_nobody_asked_for(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    stranger = {f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": np.zeros((2, 4), np.float32)}
    problem(push(weights=adapter(**stranger)), 422, "adapter_mismatch")


def test_nan_in_the_weights(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    bad = {f"{PREFIX}{Q_PROJ}.lora_A.weight": np.full((2, 4), np.nan, np.float32)}
    error = problem(push(weights=adapter(**bad)), 422, "adapter_mismatch")
    assert Q_PROJ in error["faults"][0]


def test_no_configuration(push: Callable[..., Any], problem: Any) -> None:
    problem(push(config=None), 422, "adapter_invalid")


def test_an_upload_over_the_limit(
    client: Client, engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    error = problem(push(weights=b"x" * 100_001), 413, "body_too_large")
    assert "--max-upload" in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 1000

    octets = {"content-type": "application/octet-stream"}
    response = client.post("/v1/weights?name=policy", content=endless(), headers=octets)
    problem(response, 413, "body_too_large")
    assert not engine.published


# ---- JSON bodies --------------------------------------------------------------------------------------------------

JSON_ROUTES = {
    "/v1/rollouts": {"policy": "base", "prompts": [{"token_ids": [1, 2]}]},
    "/v1/logprobs": {"policy": "base", "sequences": [{"token_ids": [1, 2]}]},
    "/v1/completions": {"model": "base", "prompt": [1, 2]},
    "/v1/weights/policy/activate": {"version": 2},
}


@pytest.fixture(params=JSON_ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def send(client: Client, route: str, body: bytes, content_type: str | None = "application/json") -> Any:
    return client.post(route, content=body, headers={"content-type": content_type} if content_type else {})


def test_the_routes_take_what_is_right(client: Client, route: str) -> None:
    body = json.dumps(JSON_ROUTES[route]).encode()
    assert send(client, route, body).status_code == 200
    assert send(client, route, body, "application/json; charset=utf-8").status_code == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON"),
        (b"", "empty"),
        (b"  ", "empty"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1} x', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b'{"a": "\xc3"}', "UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": -Infinity}', "Infinity"),
        (b'{"policy": "a", "policy": "b"}', "twice"),
        (b'{"prompts": [{"seed": 1, "seed": 2}]}', "twice"),
        (b'{"policy": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "number"),
        (b"[" * 65 + b"]" * 65, "nested"),
        (b'{"a":' * 100_00 + b"1" + b"}" * 100_00, "nested"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_broken_json(client: Client, route: str, body: bytes, says: str, problem: Callable[..., Any]) -> None:
    error = problem(send(client, route, body), 400, "bad_body")
    assert says in error["message"] or (not body.strip() and "empty" in error["message"])


def test_a_surrogate_pair_is_a_character(client: Client, engine: FakeEngine) -> None:
    body = b'{"policy": "base", "prompts": [{"text": "\\ud83d\\ude00"}]}'
    assert send(client, "/v1/rollouts", body).status_code == 200
    assert engine.tokenizer.decode(engine.submitted[-1][1][0].prompt_ids) == "😀"


@pytest.mark.parametrize("body", [b"[]", b"1", b'"text"', b"null"])
def test_json_that_is_no_object(client: Client, route: str, body: bytes, problem: Callable[..., Any]) -> None:
    problem(send(client, route, body), 400, "invalid_field")


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_wrong_content_type(client: Client, route: str, content_type: str | None, problem: Callable[..., Any]) -> None:
    body = json.dumps(JSON_ROUTES[route]).encode()
    problem(send(client, route, body, content_type), 415, "unsupported_media_type")


def test_a_json_body_over_the_limit(client: Client, route: str, problem: Callable[..., Any]) -> None:
    body = json.dumps(JSON_ROUTES[route]).encode() + b" " * 200_000
    error = problem(send(client, route, body), 413, "body_too_large")
    assert "--max-body" in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    problem(client.post(route, content=endless(), headers={"content-type": "application/json"}), 413, "body_too_large")


def test_unknown_fields_are_named(client: Client, route: str, problem: Callable[..., Any]) -> None:
    error = problem(client.post(route, json=JSON_ROUTES[route] | {"colour": "red"}), 400, "invalid_field", "colour")
    assert "colour" in error["message"]


# ---- values -------------------------------------------------------------------------------------------------------


def rollouts(client: Client, **changes: Any) -> Any:
    return client.post("/v1/rollouts", json=JSON_ROUTES["/v1/rollouts"] | changes)


def completions(client: Client, **changes: Any) -> Any:
    return client.post("/v1/completions", json=JSON_ROUTES["/v1/completions"] | changes)


SAMPLING = [
    *[{"temperature": value} for value in (-1, -0.1, 101, 1e300, 1e-9, "1", True, [1])],
    *[{"top_p": value} for value in (0, -0.5, 1.01, "1", True)],
    *[{"top_k": value} for value in (-1, 2**31, 1.5, "5", True, 10**30)],
    *[{"min_p": value} for value in (-0.1, 1.1, "0", True)],
    *[{"max_tokens": value} for value in (-1, 1.5, "5", True)],
    *[{"min_tokens": value} for value in (-1, 10**9, "1", True)],
    *[{"seed": value} for value in (-1, 2**53, 1.0, "1", True)],
    *[{"stop": value} for value in ("", [""], ["x"] * 65, 5, [5], {"a": 1})],
    *[{"stop_token_ids": value} for value in ([-1], [VOCABULARY], ["1"], [True], [1.0], 5)],
    *[{"ignore_eos": value} for value in (1, "true")],
]


@pytest.mark.parametrize("values", SAMPLING, ids=str)
def test_absurd_sampling_values(client: Client, values: dict[str, Any], problem: Callable[..., Any]) -> None:
    (name,) = values
    error = problem(completions(client, **values), 400, "invalid_field")
    assert error["param"].split("[")[0] == name
    error = problem(rollouts(client, sampling=values), 400, "invalid_field")
    assert error["param"].split("[")[0] == f"sampling.{name}"


def test_infinite_numbers_too_large_to_write(client: Client, problem: Callable[..., Any]) -> None:
    body = b'{"model": "base", "prompt": [1], "temperature": 1e999}'
    problem(send(client, "/v1/completions", body), 400, "invalid_field", "temperature")


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**40, 10**30, True, 1.0, "1", None, [1]], ids=str)
def test_token_ids_out_of_the_vocabulary(client: Client, wrong: Any, problem: Callable[..., Any]) -> None:
    ids = [1, wrong]
    place = "token_ids[1]"
    problem(
        rollouts(client, prompts=[{"token_ids": [3]}, {"token_ids": ids}]), 400, "invalid_field", f"prompts[1].{place}"
    )
    scored = client.post("/v1/logprobs", json={"policy": "base", "sequences": [{"token_ids": ids}]})
    problem(scored, 400, "invalid_field", f"sequences[0].{place}")
    problem(completions(client, prompt=ids), 400, "invalid_field", "prompt[1]")
    problem(completions(client, prompt=[[2], ids]), 400, "invalid_field", "prompt[1][1]")


def test_empty_prompts(client: Client, problem: Callable[..., Any]) -> None:
    for prompts, param in (
        ([], "prompts"),
        ([{"token_ids": []}], "prompts[0].token_ids"),
        ([{"text": ""}], "prompts[0].text"),
        ([{"messages": []}], "prompts[0].messages"),
        ([{}], "prompts[0]"),
    ):
        problem(rollouts(client, prompts=prompts), 400, "invalid_field", param)
    for prompt, param in (
        ("", "prompt"),
        ([], "prompt"),
        ([""], "prompt[0]"),
        ([[]], "prompt[0]"),
        ([[1], []], "prompt[1]"),
    ):
        problem(completions(client, prompt=prompt), 400, "invalid_field", param)
    problem(client.post("/v1/logprobs", json={"policy": "base", "sequences": []}), 400, "invalid_field", "sequences")


def test_prompts_of_a_wrong_kind(client: Client, problem: Callable[..., Any]) -> None:
    for prompt in (5, {"a": 1}, None, [None], [{"text": "a"}], ["a", 1], [1, "a"], [[1], "a"], [["a"]]):
        error = problem(completions(client, prompt=prompt), 400, "invalid_field")
        assert error["param"].startswith("prompt")
    for prompt_, param in (
        ({"token_ids": [1], "text": "a"}, "prompts[0]"),
        ({"token_ids": [1], "add_special_tokens": False}, "prompts[0].add_special_tokens"),
        ({"text": "a", "add_generation_prompt": True}, "prompts[0].add_generation_prompt"),
        ({"messages": [{"role": "user", "content": 5}]}, "prompts[0].messages[0].content"),
        ({"messages": [{"content": "a"}]}, "prompts[0].messages[0].role"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tokenize": False}},
            "prompts[0].messages",
        ),
    ):
        problem(rollouts(client, prompts=[prompt_]), 400, "invalid_field", param)


def test_prompts_longer_than_the_context(client: Client, problem: Callable[..., Any]) -> None:
    long = [1] * CONTEXT
    code = "context_length_exceeded"
    problem(rollouts(client, prompts=[{"token_ids": long}]), 400, code, "prompts[0]")
    problem(completions(client, prompt=[[1], long]), 400, code, "prompt[1]")
    problem(completions(client, prompt="the cat " * CONTEXT), 400, code, "prompt")
    problem(completions(client, prompt=[*long, 1], echo=True, max_tokens=0), 400, code, "prompt")
    scored = {"policy": "base", "sequences": [{"token_ids": [*long, 1]}]}
    problem(client.post("/v1/logprobs", json=scored), 400, code, "sequences[0].token_ids")
    # prompt and reply together
    problem(completions(client, prompt=[1] * 10, max_tokens=CONTEXT - 9), 400, code, "max_tokens")
    problem(rollouts(client, sampling={"max_tokens": 10**30}), 400, code, "sampling.max_tokens")
    prompts = [{"token_ids": [1], "max_tokens": CONTEXT}]
    problem(rollouts(client, prompts=prompts), 400, code, "prompts[0].max_tokens")
    assert completions(client, prompt=[1] * 10, max_tokens=CONTEXT - 10).status_code == 200


def test_too_many_rows_are_refused_before_they_are_made(client: Client, problem: Callable[..., Any]) -> None:
    problem(rollouts(client, n=10**12), 400, "invalid_field", "n")
    problem(completions(client, n=10**12), 400, "invalid_field", "n")
    problem(
        rollouts(client, prompts=[{"token_ids": [1], "n": 40_000}, {"token_ids": [1], "n": 40_000}]),
        400,
        "invalid_field",
    )


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"top_logprobs": VOCABULARY + 1}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"return": ["text", "nonsense"]}, "return"),
        ({"return": "text"}, "return"),
        ({"on_update": "never"}, "on_update"),
        ({"min_version": -1}, "min_version"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "5"}, "timeout_s"),
        ({"stream": "true"}, "stream"),
        ({"policy": "a b"}, "policy"),
        ({"policy": "policy@x"}, "policy"),
        ({"policy": "policy@sha256:12"}, "policy"),
        ({"policy": ""}, "policy"),
        ({"policy": None}, "policy"),
        ({"id": ""}, "id"),
        ({"id": 5}, "id"),
    ],
    ids=str,
)
def test_other_values_of_a_rollout(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    problem(rollouts(client, **changes), 400, "invalid_field", param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"max_staleness": 4}, "max_staleness"),
        ({"wait_s": 1}, "wait_s"),
        ({"return_when": {"finished": 1}}, "return_when"),
        ({"on_update": "switch"}, "on_update"),
        ({"on_update": "abort"}, "on_update"),
        ({"return": ["base_logprobs"]}, "return"),
        ({"prompts": [{"token_ids": [1], "prefix": {"token_ids": [2]}}]}, "prompts[0].prefix"),
        ({"sampling": {"presence_penalty": 0.5}}, "sampling.presence_penalty"),
        ({"sampling": {"frequency_penalty": True}}, "sampling.frequency_penalty"),
        ({"sampling": {"repetition_penalty": 1.1}}, "sampling.repetition_penalty"),
        ({"sampling": {"logit_bias": {"5": 1}}}, "sampling.logit_bias"),
        ({"sampling": {"structured_outputs": {"regex": "a"}}}, "sampling.structured_outputs"),
    ],
    ids=str,
)
def test_what_is_not_served_yet_is_named(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    problem(rollouts(client, **changes), 400, "unsupported_field", param)


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 1},
        {"logit_bias": {"1": 2}},
        {"best_of": 2},
        {"suffix": "x"},
        {"user": "me"},
        {"response_format": {}},
    ],
    ids=str,
)
def test_what_completions_do_not_serve_yet(client: Client, changes: Any, problem: Callable[..., Any]) -> None:
    problem(completions(client, **changes), 400, "unsupported_field", next(iter(changes)))


def test_binary_replies_are_not_served_yet(client: Client, problem: Callable[..., Any]) -> None:
    for route in ("/v1/rollouts", "/v1/logprobs"):
        response = client.post(route, json=JSON_ROUTES[route], headers={"accept": "application/vnd.safetensors"})
        problem(response, 400, "unsupported_field", "Accept")
        both = {"accept": "application/json, application/vnd.safetensors;q=0.5"}
        assert client.post(route, json=JSON_ROUTES[route], headers=both).status_code == 200


def test_several_faults_are_told_at_once(client: Client, problem: Callable[..., Any]) -> None:
    error = problem(rollouts(client, n="x", colour=1, stream=5), 400, "invalid_field")
    assert all(name in error["message"] for name in ("n:", "colour", "stream"))


def test_logprobs_values(client: Client, problem: Callable[..., Any]) -> None:
    def score(**changes: Any) -> Any:
        return client.post("/v1/logprobs", json=JSON_ROUTES["/v1/logprobs"] | changes)

    for changes, param in (
        ({"temperature": 0}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_logprobs": VOCABULARY + 1}, "top_logprobs"),
        ({"return": ["text"]}, "return[0]"),
        ({"sequences": [{"token_ids": [1, 2], "start": 2}]}, "sequences[0].start"),
        ({"sequences": [{"token_ids": [1, 2], "start": -1}]}, "sequences[0].start"),
        ({"sequences": [{"token_ids": []}]}, "sequences[0].token_ids"),
        ({"sequences": {"token_ids": [1]}}, "sequences"),
    ):
        problem(score(**changes), 400, "invalid_field", param)
    spans = [{"token_ids": [1, 2], "versions": []}]
    problem(score(sequences=spans), 400, "unsupported_field", "sequences[0].versions")


def test_completions_values(client: Client, problem: Callable[..., Any]) -> None:
    for changes, param in (
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": VOCABULARY + 1}, "logprobs"),
        ({"logprobs_mode": "raw"}, "logprobs_mode"),
        ({"echo": 1}, "echo"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        ({"n": 0}, "n"),
        ({"model": 5}, "model"),
    ):
        problem(completions(client, **changes), 400, "invalid_field", param)
    problem(completions(client, model="nobody"), 404, "unknown_policy")
