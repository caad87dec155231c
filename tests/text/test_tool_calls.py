"""What leaves as a tool call: JSON, an object, and what the server takes back as history."""

from __future__ import annotations

import json
from pkgutil import iter_modules
from typing import Any

import msgspec
import pytest
from mlx_lm import tool_parsers
from mlx_lm.tool_parsers import glm47, json_tools, kimi_k2, minicpm5, minimax_m2, mistral, pythonic, qwen3_coder

from rollout_server.schemas.messages import Message
from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.tool_calls import read_arguments, read_calls

TYPES = {
    "id": {"type": "integer"},
    "amount": {"type": "number"},
    "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "rest": {"type": "object"},
    "text": {"type": "string"},
    "free": {},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": TYPES}}}]
EXACT = 9007199254740993
"""The first integer that no double holds."""


def format_of(parse: Any) -> ReplyFormat:
    return ReplyFormat(tool_start="<tool_call>", tool_end="</tool_call>", parse_tool_call=parse)


def calls_of(parse: Any, text: str, tools: Any = TOOLS) -> list[dict[str, Any]] | None:
    """Every call that leaves can be sent, and sent back."""
    calls = read_calls(format_of(parse), text, tools)
    for call in calls or ():
        json.loads(msgspec.json.encode(call))
        Message.model_validate({"role": "assistant", "tool_calls": [call]})
        read_arguments(call["function"]["arguments"], "arguments")
    return calls


def arguments_of(parse: Any, text: str) -> Any:
    calls = calls_of(parse, text)
    return None if calls is None else json.loads(calls[0]["function"]["arguments"])


REFUSED = {
    "half a surrogate pair": '{"name": "f", "arguments": {"x": "\\ud83d"}}',
    "half a pair in a key": '{"name": "f", "arguments": {"\\udc00": 1}}',
    "half a pair in the name": '{"name": "f\\ud83d", "arguments": {}}',
    "NaN": '{"name": "f", "arguments": {"x": NaN}}',
    "infinity": '{"name": "f", "arguments": {"x": [-Infinity]}}',
    "a number that overflows": '{"name": "f", "arguments": {"x": 1e999}}',
    "a list": '{"name": "f", "arguments": [1]}',
    "a number": '{"name": "f", "arguments": 1}',
    "nothing": '{"name": "f", "arguments": null}',
    "text": '{"name": "f", "arguments": "now"}',
    "text of a list": '{"name": "f", "arguments": "[1]"}',
    "text of a NaN": '{"name": "f", "arguments": "{\\"x\\": NaN}"}',
    "no text": '{"name": "f", "arguments": ""}',
    "too deep": '{"name": "f", "arguments": {"x": ' + "[" * 64 + "]" * 64 + "}}",
    "far too deep": '{"name": "f", "arguments": ' + '{"x":' * 50_000 + "1" + "}" * 50_001,
    "thousands of digits": '{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}",
    "an empty name": '{"name": "", "arguments": {}}',
    "a blank name": '{"name": " ", "arguments": {}}',
    "a name of two lines": '{"name": "f\\ng", "arguments": {}}',
    "a name that is none": '{"name": 1, "arguments": {}}',
    "no name": '{"arguments": {}}',
    "one of two": '[{"name": "f", "arguments": {}}, {"name": "f", "arguments": 1}]',
    "a list of none": "[]",
    "text alone": '"f"',
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sent_back_is_no_call(case: str) -> None:
    assert calls_of(json_tools.parse_tool_call, REFUSED[case]) is None


def test_what_can_is_one() -> None:
    for text, arguments in (
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": "{\\"x\\": [1.5, \\"é\\"]}"}', {"x": [1.5, "é"]}),
        ('{"name": "f", "arguments": {"x": "\\ud83d\\ude00"}}', {"x": "😀"}),
        ('{"name": "f", "arguments": {"x": ' + "[" * 63 + "]" * 63 + "}}", {"x": json.loads("[" * 63 + "]" * 63)}),
        (f'{{"name": "f", "arguments": {{"x": {10**400}}}}}', {"x": 10**400}),
    ):
        assert arguments_of(json_tools.parse_tool_call, text) == arguments


class Odd(Exception):
    """Of no family that the standard library has."""


@pytest.mark.parametrize(
    "error",
    [Odd, OverflowError, ZeroDivisionError, AssertionError, MemoryError, RecursionError, StopIteration, OSError],
)
def test_whatever_a_parser_raises_the_text_is_no_call(error: type[Exception]) -> None:
    def parse(text: str, tools: Any) -> Any:
        raise error

    assert calls_of(parse, "") is None


@pytest.mark.parametrize(
    "result",
    [
        {"name": "f", "arguments": {"x": {1, 2}}},
        {"name": "f", "arguments": {"x": b"1"}},
        {"name": "f", "arguments": {"x": 1j}},
        {"name": "f", "arguments": {(1, 2): 3}},
        {"name": "f", "arguments": {1: 1, "1": 2}},
        {"name": "f", "arguments": (1,)},
        ("f", {}),
        [[]],
        type(None),
        "f",
    ],
    ids=str,
)
def test_whatever_a_parser_returns_only_json_leaves(result: Any) -> None:
    assert calls_of(lambda text, tools: result, "") is None


def test_interrupts_are_not_swallowed() -> None:
    def parse(text: str, tools: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls_of(parse, "")


def test_ids_are_the_model_s_as_long_as_they_tell_calls_apart() -> None:
    def parse(text: str, tools: Any) -> Any:
        return [{"name": "f", "id": id} for id in ("a", "a", "", "\ud83d", 7, "b")]

    calls = read_calls(format_of(parse), "", TOOLS, taken={"b"})
    assert calls is not None
    ids = [call["id"] for call in calls]
    assert ids[0] == "a" and len(set(ids)) == 6 and all(id.startswith("call_") for id in ids[1:])


def qwen(**values: str) -> str:
    parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<function=f>\n{parameters}</function>"


def minimax(**values: str) -> str:
    parameters = "".join(f'<parameter name="{name}">{value}</parameter>' for name, value in values.items())
    return f'<invoke name="f">{parameters}</invoke>'


def minicpm(**values: str) -> str:
    return '"f">' + "".join(f'<param name="{name}">{value}</param>' for name, value in values.items())


def glm(**values: str) -> str:
    return "f" + "".join(f"<arg_key>{n}</arg_key>\n<arg_value>{value}</arg_value>" for n, value in values.items())


XML = [
    (qwen3_coder.parse_tool_call, qwen),
    (minimax_m2.parse_tool_call, minimax),
    (minicpm5.parse_tool_call, minicpm),
    (glm47.parse_tool_call, glm),
]


@pytest.mark.parametrize(("parse", "write"), XML, ids=[write.__name__ for _, write in XML])
def test_integers_keep_their_digits(parse: Any, write: Any) -> None:
    for value in (EXACT, -EXACT, 2**64 - 1, -(2**63), 1 << 80, 10**40 + 1):
        for name in ("id", "amount", "either"):
            assert arguments_of(parse, write(**{name: str(value)})) in ({name: value}, {name: str(value)}), (
                name,
                value,
            )
        for name in ("id", "amount"):
            assert arguments_of(parse, write(**{name: str(value)})) == {name: value}
    assert arguments_of(parse, write(amount=f"{EXACT}.0", id="7")) == {"amount": EXACT, "id": 7}
    assert arguments_of(parse, write(amount="0.25", id="-0")) == {"amount": 0.25, "id": 0}
    assert arguments_of(parse, write(amount="1e3")) == {"amount": 1000}
    assert arguments_of(parse, write(text=str(EXACT))) == {"text": str(EXACT)}
    assert arguments_of(parse, write(rest=f'{{"x": [{EXACT}]}}')) == {"rest": {"x": [EXACT]}}
    assert arguments_of(parse, write(rest="{1, 2}")) in (None, {"rest": "{1, 2}"})


@pytest.mark.parametrize("name", [module.name for module in iter_modules(tool_parsers.__path__)])
@pytest.mark.parametrize("text", ["", "f", "[", "{}", "\ud83d", qwen(id="NaN"), glm(id="{1}"), minimax(amount="inf")])
def test_no_parser_brings_a_reply_down(name: str, text: str) -> None:
    module = __import__(f"mlx_lm.tool_parsers.{name}", fromlist=["parse_tool_call"])
    calls_of(module.parse_tool_call, text)
    calls_of(module.parse_tool_call, text, None)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (pythonic.parse_tool_call, f"[f(id={EXACT})]"),
        (mistral.parse_tool_call, f'f[ARGS]{{"id": {EXACT}}}'),
        (kimi_k2.parse_tool_call, f'functions.f:0<|tool_call_argument_begin|>{{"id": {EXACT}}}'),
        (json_tools.parse_tool_call, f'{{"name": "f", "arguments": {{"id": {EXACT}}}}}'),
    ],
    ids=["pythonic", "mistral", "kimi", "json"],
)
def test_other_forms_keep_them_too(parse: Any, text: str) -> None:
    assert arguments_of(parse, text) == {"id": EXACT}
