"""OpenAI's SDK against the embedded model: every parameter on both routes, whole, streamed and asynchronous."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.laws.grids import corners
from tests.openai_sdk.routes import PROMPT, ROUTES, arguments, resource, streamed, whole
from tests.support.live_server import Server
from tests.support.numbers.bounds import EMBEDDED

# The embedded model answers in digits or words, so these stop somewhere within.
STOPS = ["4", "6", " ", "one", "ty", "ards", "\n\n"]

COLDEST = 0.5
"""Of the temperatures that log-probabilities are given at: what divides logits divides their rounding."""

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 2.0},
    "top_p": {"top_p": 0.8},
    "everything in the SDK": {"temperature": 1.5, "top_p": 0.9, "stop": "5", "seed": 11},
    "one token": {"max_tokens": 1},
    "n": {"n": 3},
    "n and stop": {"n": 4, "stop": STOPS},
    "a stop string": {"stop": "6"},
    "64 stop strings": {"stop": [f"<{number}>" for number in range(57)] + STOPS},
    "a stop string that stays": {"stop": STOPS, "extra_body": {"include_stop_str_in_output": True}},
    "a long stop string": {"stop": ["backwards 6", "forty six"], "temperature": 0, "top": 1},
    "stop_token_ids": {"extra_body": {"stop_token_ids": list(range(20, 30))}},
    "logprobs": {"top": 0},
    "top logprobs": {"top": 5},
    "n with logprobs": {"top": 2, "n": 3, "stop": STOPS},
    "processed": {"top": 3, "temperature": 0.5, "top_p": 0.9, "extra_body": {"logprobs_mode": "processed_logprobs"}},
    "top_k": {"extra_body": {"top_k": 2}},
    "min_p": {"extra_body": {"min_p": 0.2}},
    "ignore_eos": {"extra_body": {"ignore_eos": True}},
    "min_tokens": {"extra_body": {"min_tokens": 6}},
    "a name": {"model": "policy"},
    "a version": {"model": "policy@1", "temperature": 0},
    "the base's id": {"model": "org/demo"},
    "no change": {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}},
}


def within(values: list[float]) -> float:
    return EMBEDDED.of_logprobs(values, 100) / COLDEST


def call(route: str, case: str, **more: Any) -> dict[str, Any]:
    fields = dict(CASES[case])
    extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
    return arguments(route, **fields, **more, extra_body=extra)


@pytest.mark.parametrize(("route", "case"), corners(list(ROUTES), list(CASES)))
def test_whole(client: OpenAI, tokenizer: Any, route: str, case: str) -> None:
    asked = call(route, case)
    raw = resource(client, route).with_raw_response.create(**asked)
    reply = raw.parse()
    answers = whole(route, reply)
    assert len(answers) == asked.get("n", 1)
    assert reply.model == asked["model"]
    expected = {"policy": "policy@2", "policy@1": "policy@1"}.get(asked["model"], "base@0")
    assert raw.headers["x-policy"] == expected
    assert reply.usage.completion_tokens == sum(len(answer.ids) for answer in answers)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    for answer in answers:
        assert answer.finish_reason in ("stop", "length")
        assert (answer.finish_reason == "length") <= (len(answer.ids) == asked["max_tokens"])
        (span,) = answer.versions
        assert (f"{span['policy']}@{span['version']}", span["end"]) == (expected, len(answer.ids))
        said = tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert said.startswith(answer.text)
        for stop in [asked["stop"]] if isinstance(asked.get("stop"), str) else asked.get("stop", []):
            assert asked["extra_body"].get("include_stop_str_in_output") or stop not in answer.text
        if "top" in CASES[case]:
            assert len(answer.tokens) == len(answer.values) == len(answer.tops) == len(answer.ids)
            assert all(value <= 0 for value in answer.values)
        assert answer.mode == asked["extra_body"].get("logprobs_mode", "raw_logprobs")


@pytest.mark.parametrize(("route", "case"), corners(list(ROUTES), list(CASES)))
def test_a_stream_adds_up_to_the_same(client: OpenAI, route: str, case: str) -> None:
    asked = call(route, case)
    reply = resource(client, route).create(**asked)
    with resource(client, route).create(**asked, stream=True, stream_options={"include_usage": True}) as events:
        answers, usage = streamed(route, events, asked.get("n", 1))
    for got, expected in zip(answers, whole(route, reply), strict=True):
        # Another batch may change the last bits of what is a float.
        assert got.values == pytest.approx(expected.values, abs=within(expected.values))
        assert [[name for name, _ in top] for top in got.tops] == [[name for name, _ in top] for top in expected.tops]
        got.values, got.tops = expected.values, expected.tops
        assert got == expected
    # The second of them finds what the first has read.
    assert usage.prompt_tokens_details.cached_tokens >= reply.usage.prompt_tokens_details.cached_tokens
    assert usage.model_copy(update={"prompt_tokens_details": None}) == reply.usage.model_copy(
        update={"prompt_tokens_details": None}
    )


@pytest.mark.parametrize(
    ("route", "case"),
    corners(list(ROUTES), ["greedy", "n and stop", "top logprobs", "a name", "a long stop string", "hot"]),
)
def test_asynchronously(live: Server, client: OpenAI, route: str, case: str) -> None:
    asked = call(route, case)

    async def ask() -> tuple[Any, list[Any]]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as caller:
            reply = await resource(caller, route).create(**asked)
            stream = await resource(caller, route).create(**asked, stream=True)
            return reply, [event async for event in stream]

    reply, events = asyncio.run(ask())
    expected = [answer.text for answer in whole(route, resource(client, route).create(**asked))]
    assert [answer.text for answer in whole(route, reply)] == expected
    assert [answer.text for answer in streamed(route, events, asked.get("n", 1))[0]] == expected


@pytest.mark.parametrize("prompt", [["1+1=", "2+2="], [[20, 14, 20, 31]], [20, 14, 20, 31], "1+1="], ids=str)
@pytest.mark.parametrize("n", [1, 2])
def test_the_forms_of_a_prompt(client: OpenAI, prompt: Any, n: int) -> None:
    reply = client.completions.create(model="base", prompt=prompt, max_tokens=4, n=n, temperature=0)
    prompts = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
    assert [choice.index for choice in reply.choices] == list(range(prompts * n))


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: OpenAI, max_tokens: int, stream: bool) -> None:
    """As evaluation harnesses ask for likelihoods."""
    asked = arguments("completions", max_tokens=max_tokens, echo=True, top=1, temperature=0, stream=stream)
    reply = client.completions.create(**asked)
    (answer,) = streamed("completions", reply)[0] if stream else whole("completions", reply)
    assert answer.text.startswith(PROMPT)
    assert answer.values[0] is None and all(value <= 0 for value in answer.values[1:])
    assert len(answer.tokens) == len(answer.values) == len(answer.offsets)
    for token, offset in zip(answer.tokens, answer.offsets, strict=True):
        assert answer.text.startswith(token, offset) or offset == len(answer.text)


@pytest.mark.parametrize("route", ROUTES)
def test_logprobs_are_the_scorer_s(live: Server, client: OpenAI, route: str) -> None:
    import httpx

    reply = resource(client, route).create(**arguments(route, top=2, extra_body={"return_token_ids": True}))
    (answer,) = whole(route, reply)
    prompt = reply.prompt_token_ids if route == "chat" else reply.choices[0].prompt_token_ids
    sequence = {"token_ids": prompt + answer.ids, "start": len(prompt)}
    scored = httpx.post(f"{live.url}/v1/logprobs", json={"policy": "base", "sequences": [sequence]}).json()
    assert answer.values == pytest.approx(scored["sequences"][0]["logprobs"], abs=within(answer.values))


def test_chat_reads_what_the_tokenizer_route_says(live: Server, client: OpenAI, tokenizer: Any) -> None:
    import httpx

    messages: Any = [
        {"role": "system", "content": "add"},
        {"role": "user", "content": [{"type": "text", "text": "1+1="}]},
    ]
    reply = client.chat.completions.create(
        model="base", messages=messages, max_tokens=2, extra_body={"return_token_ids": True}
    )
    found: Any = reply
    plain = [messages[0], {"role": "user", "content": "1+1="}]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert found.prompt_token_ids == expected
    assert httpx.post(f"{live.url}/tokenize", json={"messages": messages}).json()["tokens"] == expected


def test_tools_are_rendered_and_a_reply_goes_back_as_it_came(client: OpenAI, tokenizer: Any) -> None:
    tools: Any = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    first = client.chat.completions.create(**arguments("chat", tools=tools, tool_choice="auto"))
    message = first.choices[0].message
    messages: Any = [{"role": "user", "content": PROMPT}, message, {"role": "user", "content": "2+2="}]
    again: Any = client.chat.completions.create(
        **arguments("chat", messages=messages, tools=tools, extra_body={"return_token_ids": True})
    )
    plain = [messages[0], {"role": "assistant", "content": message.content}, messages[2]]
    expected = tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=True, return_dict=False)
    assert again.prompt_token_ids == expected


def test_the_sdk_s_own_stream_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(**arguments("chat", temperature=0)) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert (
        final.choices[0].message.content
        == client.chat.completions.create(**arguments("chat", temperature=0)).choices[0].message.content
    )


def test_models(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["base", "org/demo", "policy", "policy@1", "policy@2"]
    for name in names:
        model: Any = client.models.retrieve(name)
        assert (model.id, model.max_model_len) == (name, 2048)
        assert model.digest.startswith("sha256:") and model.eos_token_ids == [1]
