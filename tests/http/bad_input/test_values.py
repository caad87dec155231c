"""Values that are wrong, absurd, or not served yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from tests.http.bad_input.routes import JSON_ROUTES
from tests.support.http.fake_engine import CONTEXT, VOCABULARY

Client = TestClient[Any]


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
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    problem(response, 400, "invalid_field", "temperature")


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
            "prompts[0].chat_template_kwargs",
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
    problem(rollouts(client, sampling={"max_tokens": 10**12}), 400, code, "sampling.max_tokens")
    error = problem(rollouts(client, sampling={"max_tokens": 10**400}), 400, "invalid_field", "sampling.max_tokens")
    assert len(error["message"]) < 300
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
        ({"sampling": {"presence_penalty": 2.5}}, "sampling.presence_penalty"),
        ({"sampling": {"frequency_penalty": True}}, "sampling.frequency_penalty"),
        ({"sampling": {"repetition_penalty": 0}}, "sampling.repetition_penalty"),
        ({"sampling": {"logit_bias": {"5": 101}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {"5": "1"}}}, "sampling.logit_bias.5"),
        ({"sampling": {"logit_bias": {"-5": 1}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {"05": 1}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {"cat": 1}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": [5]}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {"4000000000": 1}}}, "sampling.logit_bias.4000000000"),
        ({"return": ["text", "nonsense"]}, "return"),
        ({"return": "text"}, "return"),
        ({"on_update": "never"}, "on_update"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"min_version": -1}, "min_version"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "5"}, "timeout_s"),
        ({"stream": "true"}, "stream"),
        ({"policy": "policy@x"}, "policy"),
        ({"policy": "policy@sha256:12"}, "policy"),
        ({"policy": ""}, "policy"),
        ({"policy": None}, "policy"),
        ({"id": ""}, "id"),
        ({"id": 5}, "id"),
        ({"wait_s": 1}, "wait_s"),
        ({"wait_s": -1, "min_version": 1}, "wait_s"),
        ({"wait_s": "1", "min_version": 1}, "wait_s"),
    ],
    ids=str,
)
def test_other_values_of_a_rollout(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    problem(rollouts(client, **changes), 400, "invalid_field", param)


STRUCTURED: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": {"type": "frob"}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": [1]}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"json_object": True, "whitespace_pattern": "("}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
        "structured_outputs.whitespace_pattern",
    ),
    ({"structured_outputs": {"backend": "xgrammar"}}, "structured_outputs.backend"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
]


@pytest.mark.parametrize(("changes", "param"), STRUCTURED, ids=str)
def test_what_is_no_grammar(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    problem(completions(client, **changes), 400, "invalid_field", param)
    problem(rollouts(client, sampling=changes), 400, "invalid_field", f"sampling.{param}")


def test_a_schema_as_text_is_json(client: Client, problem: Callable[..., Any]) -> None:
    bad = {"structured_outputs": {"json": "{'type'"}}
    problem(completions(client, **bad), 400, "bad_body", "structured_outputs.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"best_of": 2},
        {"suffix": "x"},
        {"user": "me"},
    ],
    ids=str,
)
def test_what_completions_do_not_serve_yet(client: Client, changes: Any, problem: Callable[..., Any]) -> None:
    problem(completions(client, **changes), 400, "unsupported_field", next(iter(changes)))


def test_a_stream_is_never_binary(client: Client, problem: Callable[..., Any]) -> None:
    binary = {"accept": "application/vnd.safetensors"}
    response = client.post("/v1/rollouts", json=JSON_ROUTES["/v1/rollouts"] | {"stream": True}, headers=binary)
    problem(response, 400, "unsupported_field", "Accept")
    both = {"accept": "application/vnd.safetensors, application/json;q=0.1"}
    response = client.post("/v1/rollouts", json=JSON_ROUTES["/v1/rollouts"] | {"stream": True}, headers=both)
    assert response.headers["content-type"].startswith("application/x-ndjson")


def test_several_faults_are_told_at_once(client: Client, problem: Callable[..., Any]) -> None:
    error = problem(rollouts(client, n="x", colour=1, stream=5), 400, "invalid_field")
    assert all(name in error["message"] for name in ("n must", "colour", "stream"))


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
        ({"sequences": [{"token_ids": [1, 2], "versions": []}]}, "sequences[0].versions"),
        ({"sequences": {"token_ids": [1]}}, "sequences"),
    ):
        problem(score(**changes), 400, "invalid_field", param)


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
