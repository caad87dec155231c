"""What a chat reply has to match: its format, or calls as the model writes them (`tool_choice`)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from rollout_server.errors import UnsupportedField
from rollout_server.grammar import WHITESPACE, Constraint, Grammar, GrammarKind
from rollout_server.http.service import Service
from rollout_server.http.structured import constraint_of
from rollout_server.schemas.chat import ChatRequest
from rollout_server.text.chat_format import ReplyFormat

JSON_TOOLS = "json_tools"
"""mlx-lm's name of Hermes' and Qwen's form: an object with `name` and `arguments` between two marks."""


def constraint_of_chat(
    data: ChatRequest, format: ReplyFormat, service: Service, *, thinking: bool
) -> Constraint | None:
    """See `structured.constraint_of`. `thinking`: the prompt ends inside of reasoning, which is the model's own affair;
    the reply behind it is what was asked for."""
    after = format.think_end_ids if thinking else ()
    if not data.must_call:
        return constraint_of(data, service, after=after)
    return service.engine.compile(replace(grammar_of_calls(data, format, service.tokenizer), after=after), "tools")


def grammar_of_calls(data: ChatRequest, format: ReplyFormat, tokenizer: Any) -> Grammar:
    """One call or more of any tool, or one of the named tool; arguments by its `parameters`. Raises `UnsupportedField`
    where the model writes calls otherwise than as JSON."""
    if format.tool_style != JSON_TOOLS or format.tool_start is None or not format.tool_end:
        found = f"writes calls as mlx-lm's {format.tool_style}" if format.tool_style else "has no format for calls"
        raise UnsupportedField(
            f"tool_choice cannot ask for a call here: this model {found}, and only JSON is kept to; use 'auto' or "
            "'none'.",
            param="tool_choice",
        )
    start, end = (_mark(mark, tokenizer) for mark in (format.tool_start, format.tool_end))
    tools = data.callable_tools
    bodies = [
        f'call_{at}: {_opening(tool["name"])} arguments_{at} "}}"\n'
        f"arguments_{at}: %json {json.dumps(_parameters(tool), ensure_ascii=False)}"
        for at, tool in enumerate(tools)
    ]
    more = "" if data.called_name else ' ("\\n" call)*'
    one_of = " | ".join(f"call_{at}" for at in range(len(tools)))
    rules = [f"start: call{more}", f'call: {start} "\\n" body "\\n" {end}', f"body: {one_of}", *bodies]
    return Grammar(GrammarKind.GRAMMAR, "\n".join(rules) + "\n")


def _opening(name: str) -> str:
    """What stands before the arguments, as a literal of Lark's."""
    return _literal('{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": ')


def _parameters(tool: dict[str, Any]) -> Any:
    """The schema of a tool's arguments; without one they are any object."""
    given = tool.get("parameters")
    schema = {"type": "object"} if given is None else given
    return schema | {"x-guidance": {"whitespace_pattern": WHITESPACE}} if isinstance(schema, dict) else schema


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _mark(mark: str, tokenizer: Any) -> str:
    """A mark that is one token is that token, which the same characters would not be."""
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return f"<[{ids[0]}]>" if len(ids) == 1 else _literal(mark)
