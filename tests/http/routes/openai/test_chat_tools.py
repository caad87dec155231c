"""Tool calls and reasoning over HTTP, with a template like Qwen's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from litestar.testing import TestClient
from tokenizers import AddedToken

from rollout_server.config import ServerConfig
from rollout_server.rollout import FinishReason
from rollout_server.schemas.openai.chat import ChatChunk, ChatReply
from rollout_server.text.chat_format import ReplyFormat
from tests.support.http.fake_engine import FakeEngine, Row
from tests.support.http.fixtures import MakeApp, byte_level_tokenizer
from tests.support.http.sse import events, joined_chat

Client = TestClient[Any]
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ 'assistant' if message.role == 'assistant' else 'user' }}|>"
    "{{ message.content }}"
    "{% for call in message.tool_calls %}{% set tool_call = call.function %}"
    '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}<think>\n{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a+b", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "user", "content": "add 1 <think>"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
END = "<|end|>"


@pytest.fixture(scope="module")
def tool_tokenizer() -> Any:
    """Marks of reasoning are plain tokens and those of tool calls special ones, as models have both."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    special = [AddedToken(text, special=True) for text in ("<tool_call>", "</tool_call>")]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def engine(tool_tokenizer: Any) -> FakeEngine:
    return FakeEngine(tool_tokenizer)


@pytest.fixture
def client(engine: FakeEngine, made_app: MakeApp) -> Iterator[Client]:
    with TestClient(made_app(ServerConfig(), engine)) as client:
        yield client


def ask(client: Client, messages: Any = MESSAGES, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "base", "messages": messages, **fields})


def says(engine: FakeEngine, text: str, reason: FinishReason = FinishReason.STOP) -> list[int]:
    ids = engine.tokenizer.encode(text)
    engine.script = lambda request, sample: Row(ids, reason, ids[-1] if reason is FinishReason.STOP else None)
    return list(ids)


def function(call: dict[str, Any]) -> tuple[str, Any]:
    assert set(call) == {"id", "type", "function"}
    return call["function"]["name"], json.loads(call["function"]["arguments"])


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    calls = [call | {"id": ""} for call in choice["message"].get("tool_calls", ())]
    return choice | {"message": choice["message"] | {"tool_calls": calls}}


def test_the_format_is_the_one_mlx_lm_finds(tool_tokenizer: Any) -> None:
    format = ReplyFormat.of(tool_tokenizer, [tool_tokenizer.eos_token_id])
    assert (format.tool_start, format.tool_end) == ("<tool_call>", "</tool_call>")
    assert (format.think_start, format.think_end) == ("<think>", "</think>")
    marks = set(tool_tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"]))
    assert marks <= format.shown(tools=True) and not marks & format.shown(tools=False)
    assert tool_tokenizer.eos_token_id not in format.special


def test_the_parser_that_the_model_s_files_name_comes_first(tool_tokenizer: Any) -> None:
    try:
        tool_tokenizer.init_kwargs["tool_parser_type"] = "mistral"
        assert ReplyFormat.of(tool_tokenizer, []).tool_start == "[TOOL_CALLS]"
        tool_tokenizer.init_kwargs["tool_parser_type"] = "os"
        assert ReplyFormat.of(tool_tokenizer, []).tool_start == "<tool_call>"
    finally:
        del tool_tokenizer.init_kwargs["tool_parser_type"]


@pytest.mark.parametrize("before", ["", "<think>\nhm</think>", "so "])
def test_calls_are_parsed_streamed_and_whole(client: Client, engine: FakeEngine, before: str) -> None:
    ids = says(engine, f"{before}{CALL}\n{CALL}{END}")
    fields: dict[str, Any] = {"tools": TOOLS, "return_token_ids": True, "logprobs": True}
    body = ask(client, **fields).json()
    ChatReply.model_validate(body)
    (choice,) = body["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and choice["token_ids"] == ids
    assert [function(call) for call in message["tool_calls"]] == [("add", {"a": 1})] * 2
    assert message["content"] == ("so " if before == "so " else None)
    assert message.get("reasoning_content") == ("\nhm" if "think" in before else None)
    chunks = events(ask(client, stream=True, **fields))
    for chunk in chunks:
        ChatChunk.model_validate(chunk)
    assert without_ids(joined_chat(chunks)) == without_ids(choice)


def test_calls_stay_text_where_they_are_not_asked_for(client: Client, engine: FakeEngine) -> None:
    says(engine, CALL + END)
    (choice,) = ask(client, tools=TOOLS, tool_choice="none").json()["choices"]
    # The marks are special tokens here, which text leaves out.
    assert choice["message"]["content"] == CALL.replace("<tool_call>", "").replace("</tool_call>", "")
    assert choice["finish_reason"] == "stop"
    says(engine, f"{CALL[:20]}", FinishReason.LENGTH)
    (choice,) = ask(client, tools=TOOLS).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL[:20], "length")


@pytest.mark.parametrize(
    "arguments",
    ['{"x": "\\ud83d"}', '{"x": NaN}', "[1]", "7", '{"x": ' + "[" * 64 + "]" * 64 + "}"],
    ids=["half", "NaN", "list", "7", "deep"],
)
def test_what_cannot_be_a_call_stays_text_beside_calls(client: Client, engine: FakeEngine, arguments: str) -> None:
    """One choice's text decides over nothing of another's, streamed or not; the message can be sent back."""
    bad = CALL.replace('{"a": 1}', arguments)
    texts = [engine.tokenizer.encode(f"{text}{END}") for text in (bad, CALL, bad + CALL)]
    engine.script = lambda request, sample: Row(texts[sample], FinishReason.STOP, texts[sample][-1])
    whole = ask(client, tools=TOOLS, n=3).json()["choices"]
    assert [choice["finish_reason"] for choice in whole] == ["stop", "tool_calls", "tool_calls"]
    assert [choice["message"]["content"] for choice in whole] == [bad, None, bad]
    assert [len(choice["message"].get("tool_calls", ())) for choice in whole] == [0, 1, 1]
    chunks = events(ask(client, tools=TOOLS, n=3, stream=True))
    for choice in whole:
        assert without_ids(joined_chat(chunks, choice["index"])) == without_ids(choice)
        sent = {key: value for key, value in choice["message"].items() if value is not None}
        assert ask(client, [*MESSAGES, sent, *MESSAGES], tools=TOOLS).status_code == 200


def test_reasoning_that_the_prompt_opened(client: Client, engine: FakeEngine) -> None:
    """What a user writes of marks opens nothing: the message above has one."""
    ids = says(engine, f"hm</think>yes{END}")
    body = ask(client, chat_template_kwargs={"think": True}, return_token_ids=True).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    end = ids.index(engine.tokenizer.convert_tokens_to_ids("</think>")) + 1
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": end}
    body = ask(client).json()
    assert body["choices"][0]["message"]["content"] == "hm</think>yes"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    chunks = events(ask(client, chat_template_kwargs={"think": True}, stream=True))
    assert joined_chat(chunks)["message"] == message


def test_a_tool_conversation_is_rendered_as_transformers_does(client: Client, engine: FakeEngine) -> None:
    """The arguments of the SDK's messages are JSON text; templates want objects, unless they ask for the type."""
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,  "b": [2]}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    assert ask(client, messages, tools=TOOLS).status_code == 200
    prompt = list(engine.submitted[-1][1][0].prompt_ids)
    objects = json.loads(json.dumps(messages))
    objects[1]["tool_calls"][0]["function"]["arguments"] = {"a": 1, "b": [2]}
    del objects[1]["content"]
    expected = engine.tokenizer.apply_chat_template(objects, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert prompt == expected
    body = {"policy": "base", "prompts": [{"messages": messages, "tools": TOOLS}]}
    assert client.post("/v1/rollouts", json=body).status_code == 200
    assert list(engine.submitted[-1][1][0].prompt_ids) == expected
    assert client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"] == expected


def test_three_turns_of_calls_go_on_from_the_exact_ids(client: Client, engine: FakeEngine) -> None:
    """What a client sends back of a reply is rendered as the model wrote it: every prompt begins with the one before
    and its completion, so that the KV kept for them serves, and a trainer may join the turns."""
    messages, known = list(MESSAGES), []
    for written in (CALL, "so " + CALL, "four"):
        ids = says(engine, written + END)
        body = ask(client, messages, tools=TOOLS, return_token_ids=True).json()
        prompt, (choice,) = body["prompt_token_ids"], body["choices"]
        assert prompt[: len(known)] == known and choice["token_ids"] == ids
        assert prompt == engine.tokenizer.apply_chat_template(
            as_objects(messages), tools=TOOLS, add_generation_prompt=True, return_dict=False
        )
        known = prompt + ids
        calls = choice["message"].get("tool_calls", [])
        answers = [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in calls]
        # As the SDK's `message.model_dump(exclude_none=True)` gives it back.
        sent = {key: value for key, value in choice["message"].items() if value is not None}
        messages += [{"content": "", **sent}, *answers]
    assert len(messages) == 6 and choice["finish_reason"] == "stop"


def as_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of calls as templates want them."""
    copied: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for call in (call for message in copied for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copied


def test_arguments_stay_text_where_the_template_asks(client: Client, engine: FakeEngine) -> None:
    tokenizer = engine.tokenizer
    exact = "{% if tool_call.arguments is string %}{{ tool_call.arguments }}{% endif %}"
    try:
        tokenizer.chat_template = TEMPLATE.replace("{{ tool_call.arguments | tojson }}", exact)
        call = {"type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
        messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
        ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert '"arguments": {"a":1}}' in tokenizer.decode(ids)
    finally:
        tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"tools": [{"type": "x"}]}, "tools[0]", "invalid_field"),
        ({"tools": [*TOOLS, {"type": "function", "function": {}}]}, "tools[1]", "invalid_field"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0]", "unsupported_field"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "bad_body",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "invalid_field",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(
    client: Client, changes: Any, param: str, code: str, problem: Callable[..., Any]
) -> None:
    problem(ask(client, **changes), 400, code, param)


NAMED = {"type": "function", "function": {"name": "add"}}


def test_a_grammar_begins_behind_the_reasoning_that_the_template_opened(client: Client, engine: FakeEngine) -> None:
    says(engine, f"yes{END}")
    mark = tuple(engine.tokenizer.encode("</think>"))
    for think in (True, False):
        for fields in ({"response_format": {"type": "json_object"}}, {"tools": TOOLS, "tool_choice": "required"}):
            assert ask(client, chat_template_kwargs={"think": think}, **fields).status_code == 200
            ((group,),) = [groups for _, groups, _ in engine.submitted[-1:]]
            assert group.sampling.constraint is not None
            assert group.sampling.constraint.grammar.after == (mark if think else ())


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_calls_that_are_asked_for_are_what_the_template_writes(client: Client, engine: FakeEngine, choice: Any) -> None:
    says(engine, f"yes{END}")
    assert ask(client, tools=TOOLS, tool_choice=choice).status_code == 200
    constraint = engine.submitted[-1][1][0].sampling.constraint
    assert constraint is not None
    encode = engine.tokenizer.encode
    for text, fits in (
        (CALL, True),
        (f"{CALL}\n{CALL}", choice == "required"),
        (f"so {CALL}", False),
        (CALL.replace("add", "sub"), False),
        (CALL.replace('{"a": 1}', "1"), False),
        (END, False),
    ):
        assert (constraint.accepted(encode(text)) == len(encode(text))) is fits, text


def test_a_model_that_writes_calls_otherwise_cannot_be_made_to(
    client: Client, tool_tokenizer: Any, problem: Callable[..., Any]
) -> None:
    try:
        tool_tokenizer.init_kwargs["tool_parser_type"] = "mistral"
        for choice in ("required", NAMED):
            error = problem(ask(client, tools=TOOLS, tool_choice=choice), 400, "unsupported_field", "tool_choice")
            assert "mistral" in error["message"]
    finally:
        del tool_tokenizer.init_kwargs["tool_parser_type"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "frob"}}}],
            },
            "tools",
        ),
        (
            {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
            "tools",
        ),
    ],
    ids=str,
)
def test_calls_that_cannot_be_asked_for(client: Client, fields: Any, param: str, problem: Callable[..., Any]) -> None:
    problem(ask(client, **{"tools": TOOLS, **fields}), 400, "invalid_field", param)
