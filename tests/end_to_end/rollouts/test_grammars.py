"""Structured output over HTTP from a real server: 200 random schemas, and every way to ask for it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests.http.routes.openai.test_chat_tools import TEMPLATE
from tests.laws.grids import some_long
from tests.support import tiny_models
from tests.support.live_server import server_here

NAMES = ("a", "size", "the name", "ключ", 'q"\\', "items", "on", "x_1")
TEXT_RULES: tuple[dict[str, Any], ...] = (
    {"maxLength": 5},
    {"minLength": 1, "maxLength": 3},
    {"pattern": "^[a-f]{2,4}$"},
    {"enum": ["red", "grün", "", 'quo"te']},
)


def assert_valid(value: Any, schema: dict[str, Any]) -> None:
    # Imported here: it compiles 38 grammars, a second for every process that only collects this file.
    import jsonschema

    jsonschema.validate(value, schema)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The model's template and marks of calls are like Qwen's, one mark a special token, the other plain text."""
    model = tiny_models.build("qwen3", tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=True)], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    with server_here(model) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """One that every text of it comes to an end, whatever is sampled."""
    kinds = ["integer", "number", "string", "boolean", "null", "const", "anyOf"]
    if depth < 3:
        kinds += ["object", "array"] * 3
    match draw.choice(kinds):
        case "object":
            names = draw.sample(NAMES, draw.randint(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(draw, depth + 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))),
                "additionalProperties": False,
            }
        case "array":
            least = draw.randint(0, 2)
            items = random_schema(draw, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + draw.randint(0, 2)}
        case "string":
            return {"type": "string", **draw.choice(TEXT_RULES)}
        case "integer":
            low = draw.randint(-300, 300)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 2000)}
        case "number":
            # All its digits are in the text, so that it ends.
            return {"enum": [draw.randint(-99, 99) / 4, draw.randint(0, 9), -0.5]}
        case "const":
            return {"const": draw.choice(["fixed", 7, None, [1, "b"], {"k": True}])}
        case "anyOf":
            return {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 99}]}
        case kind:
            return {"type": kind}


@pytest.mark.parametrize("schemas", some_long([16, 200], 16))
def test_replies_are_valid_in_random_schemas(client: httpx.Client, schemas: int) -> None:
    """Half of them through each route, at temperature 1 from random weights; none is cut."""

    def ask(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        schema = random_schema(random.Random(seed))
        shared = {"model": "base", "seed": seed, "max_tokens": 1500}
        if seed % 2:
            structured = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
            reply = client.post("/v1/completions", json={"prompt": "JSON:", **shared, **structured})
        else:
            format = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
            messages = [{"role": "user", "content": "JSON!"}]
            body = {"messages": messages, **shared, "response_format": format, "logit_bias": unspaced}
            reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return schema, reply.json()["choices"][0]

    # A format has no say in white space.
    unspaced = white(client)
    valid, texts = 0, set()
    with ThreadPoolExecutor(32) as threads:
        for schema, choice in threads.map(ask, range(schemas)):
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert choice["finish_reason"] == "stop", (schema, text)
            assert_valid(json.loads(text), schema)
            valid += 1
            texts.add(text)
    assert valid == schemas and len(texts) > schemas / 2


def test_streams_n_and_logprobs(client: httpx.Client) -> None:
    body = {
        "model": "base",
        "prompt": ["a", "b"],
        "n": 3,
        "seed": 5,
        "max_tokens": 40,
        "structured_outputs": {"regex": "[a-e]{3,6} é[0-9]{2}"},
        "logprobs": 2,
        "logprobs_mode": "processed_logprobs",
    }
    whole = client.post("/v1/completions", json=body).json()["choices"]
    parts: dict[int, str] = {}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    parts[choice["index"]] = parts.get(choice["index"], "") + choice["text"]
    assert len(whole) == 6
    for choice in whole:
        assert re.fullmatch("[a-e]{3,6} é[0-9]{2}", choice["text"]) and parts[choice["index"]] == choice["text"]
        assert choice["finish_reason"] == "stop"
        # " é" could not go on otherwise.
        assert choice["logprobs"]["token_logprobs"].count(0.0) >= 2


@pytest.mark.parametrize("name", ["<|end|>", "<|pad|>", "<tool_call>", "</tool_call>", "<think>"])
def test_text_that_spells_tokens_is_kept_to(client: httpx.Client, name: str) -> None:
    """Each route's text, on a model with end, special and other tokens of these names."""
    ask: dict[str, Any] = {"model": "base", "max_tokens": 80, "seed": 3}
    choice = {**ask, "prompt": "x", "n": 4, "structured_outputs": {"choice": [f"a{name}b"]}}
    for found in client.post("/v1/completions", json=choice).json()["choices"]:
        assert (found["text"], found["finish_reason"]) == (f"a{name}b", "stop")
    schema = {
        "type": "object",
        "properties": {name: {"const": name}},
        "required": [name],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f"}}]
    format = {"type": "json_schema", "json_schema": {"name": "named", "schema": schema}}
    chat = {**ask, "messages": [{"role": "user", "content": name}], "response_format": format, "tools": tools}
    (reply,) = client.post("/v1/chat/completions", json={**chat, "logit_bias": white(client)}).json()["choices"]
    assert json.loads(reply["message"]["content"]) == {name: name} and reply["finish_reason"] == "stop"
    sampling = {"max_tokens": 80, "structured_outputs": {"regex": f"[ab]{re.escape(name)}[ab]"}}
    rollouts = {"policy": "base", "prompts": [{"text": "x"}], "n": 4, "sampling": sampling, "return": ["text"]}
    rows = client.post("/v1/rollouts", json=rollouts).json()["rollouts"]
    for row in rows:
        assert re.fullmatch(sampling["structured_outputs"]["regex"], row["text"]) and row["finish_reason"] == "stop"
    replayed = client.post("/v1/replay", json={"rollouts": rows}).json()["rollouts"]
    assert all(found["exact"] for found in replayed)


def white(client: httpx.Client) -> dict[str, int]:
    """A bias against white space, which random weights are fond of."""
    ids = [client.post("/tokenize", json={"model": "base", "prompt": space}).json()["tokens"][0] for space in " \t\r\n"]
    return {str(id): -7 for id in ids}


def test_any_object_and_free_text(client: httpx.Client) -> None:
    ask = {"model": "base", "prompt": "x", "max_tokens": 30, "seed": 2}
    start = client.post("/v1/completions", json={**ask, "response_format": {"type": "json_object"}}).json()
    assert start["choices"][0]["text"].startswith("{")
    free = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
    same = client.post("/v1/completions", json={**ask, "response_format": {"type": "text"}}).json()
    assert same["choices"][0]["text"] == free
    schema = json.dumps({"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2})
    spaced = {"structured_outputs": {"json": schema, "whitespace_pattern": " ?"}}
    for seed in range(5):
        text = client.post("/v1/completions", json={**ask, **spaced, "seed": seed}).json()["choices"][0]["text"]
        assert re.fullmatch(r"\[ ?null ?, ?null ?\]", text)


def test_rollouts_tell_their_grammar_and_are_drawn_again(client: httpx.Client) -> None:
    structures: list[dict[str, Any]] = [
        {"regex": "[a-c]{2,8}"},
        {"choice": ["yes", "no", "pérhaps"]},
        {"grammar": 'root ::= "(" [0-9]{1,4} ")"'},
        {"json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}, "disable_any_whitespace": True},
        {"json": {"enum": ["a", 1.5]}, "whitespace_pattern": " "},
    ]
    for structure in structures:
        sampling = {"max_tokens": 40, "seed": 1, "structured_outputs": structure}
        body = {"prompts": [{"token_ids": [5, 6]}, {"text": "abc"}], "n": 3, "policy": "base", "sampling": sampling}
        rows = client.post("/v1/rollouts", json={**body, "return": ["text", "sampling_logprobs"]}).json()["rollouts"]
        assert all(row["sampling"]["structured_outputs"] == structure for row in rows)
        replayed = client.post("/v1/replay", json={"rollouts": rows}).json()["rollouts"]
        assert [found["exact"] for found in replayed] == [True] * 6
        # A row is cut, and continued under the same grammar.
        row = max(rows, key=lambda row: len(row["token_ids"]))
        prompt = {"token_ids": row["prompt_token_ids"], "prefix": {"token_ids": row["token_ids"][:1]}}
        again = {**sampling, "seed": row["seed"]}
        reply = client.post("/v1/rollouts", json={**body, "prompts": [prompt], "n": 1, "sampling": again}).json()
        assert reply["rollouts"][0]["token_ids"] == row["token_ids"]
        prompt["prefix"]["token_ids"] = [*row["token_ids"][:1], 2, 3]
        refused = client.post("/v1/rollouts", json={**body, "prompts": [prompt], "n": 1, "sampling": again})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompts[0].prefix.token_ids"


TOOLS: list[dict[str, Any]] = [
    {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
    {
        "name": 'sag "é"',
        "parameters": {
            "type": "object",
            "properties": {"mood": {"enum": ["gut", "böse"]}},
            "required": ["mood"],
            "additionalProperties": False,
        },
    },
]


def test_a_call_of_a_tool_can_be_asked_for(client: httpx.Client) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    spaces = [
        client.post("/tokenize", json={"model": "base", "prompt": space}).json()["tokens"][0] for space in " \t\r\n"
    ]
    by_name = {tool["name"]: tool["parameters"] for tool in TOOLS}
    called = set()

    def ask(seed: int, choice: Any) -> httpx.Response:
        body = {
            "model": "base",
            "messages": [{"role": "user", "content": "call!"}],
            "tools": [{"type": "function", "function": tool} for tool in TOOLS],
            "tool_choice": choice,
            "seed": seed,
            "max_tokens": 900,
            "logit_bias": {str(token): -9 for token in spaces},
        }
        return client.post("/v1/chat/completions", json=body)

    choices = ["required", named] * 6
    with ThreadPoolExecutor(len(choices)) as threads:
        replies = list(threads.map(ask, range(len(choices)), choices))
    for choice, reply in zip(choices, replies, strict=True):
        assert reply.status_code == 200, reply.text
        (given,) = reply.json()["choices"]
        assert given["finish_reason"] == "tool_calls", given
        calls = given["message"]["tool_calls"]
        for call in calls:
            called.add(call["function"]["name"])
            assert_valid(json.loads(call["function"]["arguments"]), by_name[call["function"]["name"]])
        if choice is named:
            assert [call["function"]["name"] for call in calls] == ["add"]
            assert given["message"]["content"] is None
    assert called == set(by_name)
