"""`POST /v1/chat/completions`: OpenAI's shapes, streamed and whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.rollout import FinishReason, PolicyAddress
from rollout_server.schemas.openai.chat import ChatChunk, ChatReply
from tests.support.http.fake_engine import CONTEXT, VOCABULARY, FakeEngine, Row, logprob, sampling_logprob, top_of
from tests.support.http.sse import events, joined_chat

Client = TestClient[Any]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]


def ask(client: Client, messages: Any = MESSAGES, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "base", "messages": messages, **fields})


def says(engine: FakeEngine, text: str, reason: FinishReason = FinishReason.LENGTH, stop: Any = None) -> list[int]:
    ids = engine.tokenizer.encode(text)
    engine.script = lambda request, sample: Row(ids, reason, stop)
    return list(ids)


def rendered(engine: FakeEngine, messages: Any = MESSAGES, **options: Any) -> list[int]:
    options = {"add_generation_prompt": True} | options
    return list(engine.tokenizer.apply_chat_template(messages, return_dict=False, **options))


def prompt_of(engine: FakeEngine) -> list[int]:
    return list(engine.submitted[-1][1][0].prompt_ids)


def test_a_reply_has_openai_s_shape(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    ids = says(engine, "and the hat")
    response = ask(client, model="policy", max_completion_tokens=8)
    body = response.json()
    ChatReply.model_validate(body)
    assert (body["object"], body["model"], body["id"][:9]) == ("chat.completion", "policy", "chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "and the hat", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    live = engine.live("policy")
    assert live is not None
    assert [(span["version"], span["end"]) for span in choice["rollout"]["versions"]] == [(2, len(ids))]
    assert choice["rollout"]["logprobs_mode"] == "raw_logprobs"
    assert (response.headers["x-policy"], response.headers["x-policy-digest"]) == ("policy@2", live.digest)
    prompt = len(rendered(engine))
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(ids),
        "total_tokens": prompt + len(ids),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_parameters_reach_the_engine(client: Client, engine: FakeEngine) -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "min_tokens": 2}
    ask(client, **given, ignore_eos=True, stop=["x", "y"], stop_token_ids=[3], seed=11, n=2, max_tokens=9)
    (group,) = engine.submitted[-1][1]
    assert {name: getattr(group.sampling, name) for name in given} == given
    assert (group.sampling.stop, group.sampling.stop_token_ids, group.sampling.ignore_eos) == (("x", "y"), (3,), True)
    assert (group.sampling.max_tokens, group.seeds[0], group.n) == (9, 11, 2)
    ask(client, max_tokens=5, max_completion_tokens=5)
    assert engine.submitted[-1][1][0].sampling.max_tokens == 5
    ask(client)
    (group,) = engine.submitted[-1][1]
    assert group.sampling.max_tokens == CONTEXT - len(group.prompt_ids)
    assert group.policy == PolicyAddress("base")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"shout": True}},
    ],
    ids=str,
)
def test_messages_are_those_of_rollouts_and_of_transformers(
    client: Client, engine: FakeEngine, options: dict[str, Any]
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "it is"}]
    assert ask(client, messages, **options).status_code == 200
    own = prompt_of(engine)
    body = {"policy": "base", "prompts": [{"messages": messages, **options}]}
    assert client.post("/v1/rollouts", json=body).status_code == 200
    assert own == prompt_of(engine)
    wants = {"add_generation_prompt": False} if options.get("continue_final_message") else {}
    plain = {name: value for name, value in options.items() if name != "chat_template_kwargs"}
    assert own == rendered(engine, messages, **wants, **plain, **options.get("chat_template_kwargs", {}))


def test_content_parts_are_one_text(client: Client, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert ask(client, [MESSAGES[0], {"role": "user", "content": parts}]).status_code == 200
    assert prompt_of(engine) == rendered(engine)


def test_what_the_sdk_sends_back_of_a_message_is_taken(client: Client, engine: FakeEngine) -> None:
    says(engine, "hat")
    message = ask(client).json()["choices"][0]["message"]
    nulls = {"audio": None, "function_call": None, "annotations": [], "tool_calls": None}
    assert ask(client, [*MESSAGES, message | nulls, MESSAGES[1]]).status_code == 200
    assert prompt_of(engine) == rendered(engine, [*MESSAGES, {"role": "assistant", "content": "hat"}, MESSAGES[1]])


def test_logprobs_have_bytes_and_alternatives(client: Client, engine: FakeEngine) -> None:
    ids = says(engine, "é 😀!")
    (choice,) = ask(client, logprobs=True, top_logprobs=2).json()["choices"]
    entries = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == [logprob(id) for id in ids]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "é 😀!" == choice["message"]["content"]
    assert any(entry["token"].startswith("bytes:\\x") for entry in entries)
    for id, entry in zip(ids, entries, strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == [value for _, value in top_of(id, 2)]
    (choice,) = ask(client, logprobs=True, logprobs_mode="processed_logprobs").json()["choices"]
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == [sampling_logprob(id) for id in ids]
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])


def test_token_ids_are_in_the_choice_and_the_prompt_s_above(client: Client, engine: FakeEngine) -> None:
    ids = says(engine, "hat!", FinishReason.STOP, "!")
    body = ask(client, stop="!", n=2, return_token_ids=True).json()
    assert body["prompt_token_ids"] == prompt_of(engine)
    for choice in body["choices"]:
        assert (choice["message"]["content"], choice["token_ids"]) == ("hat", ids)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "!")
    first, *others = events(ask(client, stop="!", n=2, return_token_ids=True, stream=True))
    assert first["prompt_token_ids"] == prompt_of(engine)
    assert not any("prompt_token_ids" in chunk for chunk in others)
    (choice,) = ask(client, stop="!", include_stop_str_in_output=True).json()["choices"]
    assert choice["message"]["content"] == "hat!"


@pytest.mark.parametrize("text", ["naïve 你好世界 😀😁!", " the hat and the cat", "x", ""])
def test_a_stream_adds_up_to_the_whole_reply(client: Client, engine: FakeEngine, text: str) -> None:
    says(engine, text)
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "n": 2, "stop": ["the ca"]}
    whole = ask(client, **fields).json()
    chunks = events(ask(client, stream=True, stream_options={"include_usage": True}, **fields))
    for chunk in chunks:
        ChatChunk.model_validate(chunk)
        assert chunk["object"] == "chat.completion.chunk"
        assert all("\ufffd" not in choice["delta"].get("content", "") for choice in chunk["choices"])
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["usage"]]
    assert chunks[-1]["choices"] == []
    for choice in whole["choices"]:
        assert joined_chat(chunks, choice["index"]) == choice
        assert choice["message"]["content"] == text


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tool_choice": "required"}, "tool_choice", "invalid_field"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "invalid_field"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "invalid_field"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_field"),
        ({"tool_choice": "any"}, "tool_choice", "invalid_field"),
        ({"response_format": {"type": "json"}}, "response_format.type", "invalid_field"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_field"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "invalid_field",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}},
            "response_format.json_schema.schema",
            "invalid_field",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "invalid_field",
        ),
        ({"functions": [{}]}, "functions", "unsupported_field"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_field"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_field"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_field"),
        ({"metadata": {"a": "b"}}, "metadata", "unsupported_field"),
        ({"store": True}, "store", "unsupported_field"),
        ({"user": "me"}, "user", "unsupported_field"),
        ({"colour": 1}, "colour", "invalid_field"),
        ({"logprobs": 1}, "logprobs", "invalid_field"),
        ({"top_logprobs": 1}, "top_logprobs", "invalid_field"),
        ({"logprobs": True, "top_logprobs": VOCABULARY + 1}, "top_logprobs", "invalid_field"),
        ({"max_tokens": 0}, "max_tokens", "invalid_field"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_field"),
        ({"max_completion_tokens": CONTEXT}, "max_completion_tokens", "context_length_exceeded"),
        ({"max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_field"),
        ({"stop": ["x"] * 65}, "stop", "invalid_field"),
        ({"temperature": -1}, "temperature", "invalid_field"),
        ({"messages": []}, "messages", "invalid_field"),
        ({"messages": [{"role": "forbidden", "content": "x"}]}, "messages", "invalid_field"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_field"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url.url",
            "invalid_field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "invalid_field",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "invalid_field"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "invalid_field"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "invalid_field",
        ),
        ({"messages": [{"role": "user", "content": "x" * 4 * CONTEXT}]}, "messages", "context_length_exceeded"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    client: Client, changes: Any, param: str, code: str, problem: Callable[..., Any]
) -> None:
    problem(ask(client, **changes), 400, code, param)


def test_values_that_change_nothing_are_taken(client: Client) -> None:
    fields = {
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "tool_choice": "none",
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "presence_penalty": 0,
        "user": None,
    }
    assert ask(client, **fields).status_code == 200


def test_unknown_policies(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    problem(ask(client, model="nobody"), 404, "unknown_policy", "model")
    engine.add("policy", 3)
    engine.free("policy", 1)
    for stream in (False, True):
        problem(ask(client, model="policy@1", stream=stream), 409, "version_gone", "model")


def test_a_model_without_a_template_says_so(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    template = engine.tokenizer.chat_template
    try:
        engine.tokenizer.chat_template = None
        problem(ask(client), 400, "invalid_field", "messages")
    finally:
        engine.tokenizer.chat_template = template
