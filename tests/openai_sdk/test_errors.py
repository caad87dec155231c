"""What goes wrong arrives as the SDK's own classes, and is tried again only where that can help."""

from __future__ import annotations

import logging
import threading
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.openai_sdk.conftest import ADMIN, KEY
from tests.openai_sdk.routes import ROUTES, arguments, resource, whole
from tests.support.live_server import Server, until

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": -1}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "n": ({"n": 0}, "n"),
    "seed": ({"seed": -1}, "seed"),
    "a type": ({"stream": "yes"}, "stream"),
    "65 stop strings": ({"stop": ["x"] * 65}, "stop"),
    "an empty stop string": ({"stop": [""]}, "stop[0]"),
    "max_tokens": ({"max_tokens": 4096}, "max_tokens"),
    "top_k": ({"extra_body": {"top_k": -1}}, "top_k"),
    "unknown": ({"extra_body": {"colour": 1}}, "colour"),
    "response_format": ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format.type"),
    "structured_outputs": ({"extra_body": {"structured_outputs": {"regex": "a("}}}, "structured_outputs.regex"),
    "user": ({"user": "me"}, "user"),
    "stream_options": ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
    "logprobs_mode": ({"extra_body": {"logprobs_mode": "raw"}}, "logprobs_mode"),
    "stop_token_ids": ({"extra_body": {"stop_token_ids": [9999]}}, "stop_token_ids[0]"),
}
OWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "best_of": ("completions", {"best_of": 2}, "best_of"),
    "suffix": ("completions", {"suffix": "x"}, "suffix"),
    "no echo": ("completions", {"max_tokens": 0}, "max_tokens"),
    "logprobs": ("completions", {"logprobs": 9999}, "logprobs"),
    "an empty prompt": ("completions", {"prompt": ""}, "prompt"),
    "ids": ("completions", {"prompt": [5, 9999]}, "prompt[1]"),
    "tool_choice": ("chat", {"tool_choice": "required"}, "tool_choice"),
    "store": ("chat", {"store": True}, "store"),
    "metadata": ("chat", {"metadata": {"a": "b"}}, "metadata"),
    "reasoning_effort": ("chat", {"reasoning_effort": "low"}, "reasoning_effort"),
    "top_logprobs": ("chat", {"top_logprobs": 2}, "top_logprobs"),
    "no messages": ("chat", {"messages": []}, "messages"),
    "an image": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].image_url.url",
    ),
    "two limits": ("chat", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("route", ROUTES)
def test_bad_requests(client: OpenAI, route: str, case: str) -> None:
    fields, param = BAD[case]
    with pytest.raises(openai.BadRequestError) as caught:
        resource(client, route).create(**arguments(route, **fields))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error" and caught.value.code


@pytest.mark.parametrize("case", OWN)
def test_bad_requests_of_one_route(client: OpenAI, case: str) -> None:
    route, fields, param = OWN[case]
    with pytest.raises(openai.BadRequestError) as caught:
        resource(client, route).create(**arguments(route, **fields))
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_unknown_models(client: OpenAI, route: str, stream: bool) -> None:
    for model in ("gpt-4", "policy@9", "org/other"):
        with pytest.raises(openai.NotFoundError) as caught:
            resource(client, route).create(**arguments(route, model=model, stream=stream))
        assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def answered(log: pytest.LogCaptureFixture, status: int, path: str = "") -> int:
    """How many lines the server has written of requests that got a status."""
    return sum(f"{path} {status} " in record.getMessage() for record in log.records)


def test_what_cannot_succeed_later_is_asked_once(client: OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rollout_server.access")
    for route, path in (("chat", "/v1/chat/completions"), ("completions", "/v1/completions")):
        with pytest.raises(openai.BadRequestError):
            resource(client.with_options(max_retries=3), route).create(**arguments(route, top_p=2))
        until(lambda path=path: answered(caplog, 400, path))
        assert answered(caplog, 400, path) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_keys(guarded: Server, route: str) -> None:
    for key in (KEY, ADMIN):
        with OpenAI(base_url=f"{guarded.url}/v1", api_key=key) as client:
            assert len(whole(route, resource(client, route).create(**arguments(route)))) == 1
    with OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            resource(client, route).create(**arguments(route))
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


@pytest.mark.parametrize("route", ROUTES)
def test_a_full_queue_is_tried_again(guarded: Server, route: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rollout_server.access")
    url = f"{guarded.url}/v1"
    long = arguments(route, max_tokens=1900, extra_body={"ignore_eos": True}, stream=True)
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        stream = resource(client, route).create(**long)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            resource(client, route).create(**arguments(route))
        assert caught.value.code == "queue_full"
        until(lambda: answered(caplog, 429) == 1)
        replies: list[Any] = []
        patient = client.with_options(max_retries=10)
        asking = threading.Thread(target=lambda: replies.append(resource(patient, route).create(**arguments(route))))
        asking.start()
        until(lambda: answered(caplog, 429) > 1)
        stream.close()
        asking.join(60)
    assert len(replies) == 1


@pytest.mark.parametrize("route", ROUTES)
def test_an_aborted_request_says_so(live: Server, client: OpenAI, route: str) -> None:
    import httpx

    long = arguments(route, max_tokens=1900, extra_body={"ignore_eos": True})
    id = f"mine-{route}"
    stream = resource(client, route).create(**long, stream=True, extra_headers={"X-Request-Id": id})
    events = iter(stream)
    assert next(events).id == id
    assert httpx.post(f"{live.url}/v1/abort", json={"ids": [id, "none"]}).json() == {
        "aborted": [id],
        "unknown": ["none"],
    }
    assert [event.choices[0].finish_reason for event in events][-1] == "aborted"
