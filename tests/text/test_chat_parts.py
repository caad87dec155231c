"""Reasoning, content and tool calls apart, however the text is cut into pieces."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import pytest
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.chat_parts import Gain, ReplyParts

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "é": "😀"}}\n</tool_call>'


def format_of(parser: Any = json_tools) -> ReplyFormat:
    return ReplyFormat(
        think_start="<think>",
        think_end="</think>",
        tool_start=parser.tool_call_start,
        tool_end=parser.tool_call_end,
        parse_tool_call=parser.parse_tool_call,
    )


def read(text: str, cuts: list[int], **options: Any) -> Gain:
    settings: dict[str, Any] = {"format": format_of(), "thinking": False, "tools": TOOLS, "cut": False} | options
    parts = ReplyParts(
        settings["format"],
        thinking=settings["thinking"],
        tools=settings["tools"],
        literal=settings.get("literal", False),
    )
    gain = Gain()
    edges = [0, *cuts, len(text)]
    for begin, end in pairwise(edges):
        last = end == len(text)
        gain += parts.finish(text[begin:], cut=settings["cut"]) if last else parts.push(text[begin:end])
        if last:
            break
    return gain


def said(gain: Gain) -> tuple[str, str, list[tuple[str, Any]]]:
    """Ids of calls are drawn; all else is compared."""
    functions = [call["function"] for call in gain.calls]
    assert len({call["id"] for call in gain.calls}) == len(functions)
    assert all(call["type"] == "function" for call in gain.calls)
    return gain.reasoning, gain.content, [(call["name"], json.loads(call["arguments"])) for call in functions]


ADD = ("add", {"a": 1, "é": "😀"})

CASES: dict[str, tuple[str, dict[str, Any], tuple[str, str, list[tuple[str, Any]]]]] = {
    "plain": ("a < b", {}, ("", "a < b", [])),
    "empty": ("", {}, ("", "", [])),
    "reasoning": ("<think>hm\n</think>\n\nyes", {}, ("hm\n", "\n\nyes", [])),
    "the prompt opened it": ("hm</think>yes", {"thinking": True}, ("hm", "yes", [])),
    "reasoning without an end": ("hm </thin", {"thinking": True}, ("hm </thin", "", [])),
    "one call": (CALL, {}, ("", "", [ADD])),
    "text, then two calls": (f"so\n{CALL}\n{CALL}\n", {}, ("", "so\n", [ADD, ADD])),
    "text after a call": (f"{CALL}\n done", {}, ("", "\n done", [ADD])),
    "a call out of reasoning": (f"<think>hm{CALL}", {}, ("hm", "", [ADD])),
    "a call inside of reasoning": (f"<think>hm {CALL}\n no</think>ok", {}, ("hm \n no", "ok", [ADD])),
    "two calls inside of reasoning": (
        f"hm{CALL}\n{CALL}\n</think>\n\nok",
        {"thinking": True},
        ("hm", "\n\nok", [ADD] * 2),
    ),
    "a call after reasoning with one": (f"<think>{CALL}</think>{CALL}\n", {}, ("", "", [ADD, ADD])),
    "no call inside of reasoning": (
        "<think>hm<tool_call>add</tool_call> no</think>ok",
        {},
        ("hm<tool_call>add</tool_call> no", "ok", []),
    ),
    "a call that reasoning leaves open": ("<think>hm<tool_call>add</think>ok", {}, ("hm<tool_call>add", "ok", [])),
    "a whole call that reasoning leaves open": (f"<think>hm{CALL[:-12]}</think>ok", {}, ("hm", "ok", [ADD])),
    "a call without end mark in reasoning": (
        '<think>hm[TOOL_CALLS]add[ARGS]{"a": 1}</think>ok',
        {"format": format_of(mistral)},
        ("hm", "ok", [("add", {"a": 1})]),
    ),
    "a call cut off in reasoning": (f"<think>hm{CALL[:-14]}", {"cut": True}, (f"hm{CALL[:-14]}", "", [])),
    "text that spells marks": (f"<think>{CALL}</think>", {"literal": True}, ("", f"<think>{CALL}</think>", [])),
    "text that spells marks behind reasoning": (
        f"hm</think>{CALL}<think>",
        {"literal": True, "thinking": True},
        ("hm", f"{CALL}<think>", []),
    ),
    "no JSON": ("<tool_call>add(1)</tool_call>!", {}, ("", "<tool_call>add(1)</tool_call>!", [])),
    "JSON but no call": ("<tool_call>[1]</tool_call>", {}, ("", "<tool_call>[1]</tool_call>", [])),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', {}, ("", '<tool_call>{"arguments": {}}</tool_call>', [])),
    "cut off": (CALL[:-14], {"cut": True}, ("", CALL[:-14], [])),
    "ended without its mark": (CALL[:-12], {}, ("", "", [ADD])),
    "tools are not asked for": (CALL, {"tools": None}, ("", CALL, [])),
    "only the beginning of a mark": ("a <tool_cal", {}, ("", "a <tool_cal", [])),
    "no end mark": (
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}',
        {"format": format_of(mistral)},
        ("", "", [("add", {"a": 1}), ("add", {"a": 2})]),
    ),
    "types of the tool's schema": (
        "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>",
        {"format": format_of(qwen3_coder)},
        ("", "", [("add", {"a": 3})]),
    ),
    "a model without marks": (f"<think>{CALL}", {"format": ReplyFormat()}, ("", f"<think>{CALL}", [])),
}


@pytest.mark.parametrize("case", CASES)
def test_any_cut_gives_the_same(case: str) -> None:
    text, options, expected = CASES[case]
    generator = random.Random(case)
    assert said(read(text, [], **options)) == expected
    assert said(read(text, list(range(1, len(text))), **options)) == expected
    for _ in range(50):
        cuts = sorted(generator.sample(range(len(text) + 1), min(len(text), generator.randrange(1, 6))))
        assert said(read(text, cuts, **options)) == expected


def test_text_that_can_be_no_mark_leaves_at_once() -> None:
    parts = ReplyParts(format_of(), thinking=False, tools=TOOLS)
    assert [parts.push(piece).content for piece in ("a", " <", "b", " <tool", "_call")] == ["a", " ", "<b", " ", ""]
    assert parts.finish("!", cut=False).content == "<tool_call!"


def test_where_reasoning_stands() -> None:
    parts = ReplyParts(format_of(), thinking=False, tools=None)
    text = "so <think>hm</think> yes"
    for character in text:
        parts.push(character)
    parts.finish("", cut=False)
    ((begin, end),) = parts.reasoned
    assert text[begin:end] == "<think>hm</think>"
