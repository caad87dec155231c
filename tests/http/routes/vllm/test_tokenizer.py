"""`/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.schemas.vllm.tokenizer import DetokenizeReply, TokenizeReply, TokenizerInfoReply
from tests.support.http.fake_engine import CONTEXT, VOCABULARY, FakeEngine

Client = TestClient[Any]


@pytest.mark.parametrize("text", ["the cat", "", "naïve 你好 😀 <|user|>"])
@pytest.mark.parametrize("special", [None, True, False])
def test_a_prompt_is_encoded_as_transformers_does(
    client: Client, engine: FakeEngine, text: str, special: bool | None
) -> None:
    body = client.post("/tokenize", json={"model": "base", "prompt": text, "add_special_tokens": special}).json()
    TokenizeReply.model_validate(body)
    ids = engine.tokenizer.encode(text, add_special_tokens=special is not False)
    assert body == {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids, "token_strs": None}
    back = client.post("/detokenize", json={"tokens": ids}).json()
    DetokenizeReply.model_validate(back)
    assert back == {"prompt": text}


def test_strings_of_the_tokens(client: Client, engine: FakeEngine) -> None:
    body = client.post("/tokenize", json={"prompt": "the 😀", "return_token_strs": True}).json()
    assert body["token_strs"] == engine.tokenizer.convert_ids_to_tokens(body["tokens"])


def test_messages_are_rendered(client: Client, engine: FakeEngine) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = {"messages": messages, "add_generation_prompt": False, "chat_template_kwargs": {"shout": True}}
    plain = [{"role": "user", "content": "hi"}]
    expected = engine.tokenizer.apply_chat_template(plain, shout=True, return_dict=False)
    assert client.post("/tokenize", json=body).json()["tokens"] == expected


def test_what_a_client_needs_to_render_itself(client: Client, engine: FakeEngine) -> None:
    body = client.get("/tokenizer_info").json()
    TokenizerInfoReply.model_validate(body)
    tokenizer = engine.tokenizer
    assert (body["eos_token"], body["pad_token"], body["bos_token"]) == ("<|end|>", "<|pad|>", None)
    assert body["chat_template"] == tokenizer.chat_template
    assert body["model_max_length"] == CONTEXT


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/tokenize", {}, None, "invalid_field"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user"}]}, None, "invalid_field"),
        ("/tokenize", {"prompt": ["x"]}, "prompt", "invalid_field"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt", "invalid_field"),
        ("/tokenize", {"messages": []}, "messages", "invalid_field"),
        (
            "/tokenize",
            {"messages": [{"role": "user"}], "add_special_tokens": True},
            "add_special_tokens",
            "invalid_field",
        ),
        ("/tokenize", {"messages": [{"role": "forbidden"}]}, "messages", "invalid_field"),
        ("/tokenize", {"prompt": "x", "chat_template": "y"}, "chat_template", "unsupported_field"),
        ("/detokenize", {}, "tokens", "invalid_field"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]", "invalid_field"),
        ("/detokenize", {"tokens": [1, VOCABULARY]}, "tokens[1]", "invalid_field"),
        ("/detokenize", {"tokens": "1"}, "tokens", "invalid_field"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    client: Client, path: str, body: Any, param: str | None, code: str, problem: Callable[..., Any]
) -> None:
    problem(client.post(path, json=body), 400, code, param)


def test_a_name_that_is_not_served(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.add("policy", 1)
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert client.post(path, json=body | {"model": "policy"}).status_code == 200
        problem(client.post(path, json=body | {"model": "nobody"}), 404, "unknown_policy", "model")
