"""What the text of a row has to match, as a request says it: schema, regex, choice, grammar, or calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rollout_server.errors import InvalidField, UnsupportedField
from rollout_server.grammar import WHITESPACE, Constraint, Grammar, GrammarKind
from rollout_server.http.requests.json_body import LONG
from rollout_server.http.service import Service
from rollout_server.schemas.openai.chat import ChatRequest
from rollout_server.schemas.structured import Structured, StructuredOutputs
from rollout_server.text.chat_format import ReplyFormat
from rollout_server.text.strict_json import parse_json

ANY_OBJECT = json.dumps({"type": "object"})
JSON_TOOLS = "json_tools"
"""mlx-lm's name of Hermes' and Qwen's form: an object with `name` and `arguments` between two marks."""


def extra_weight(options: Structured, *, compiles: bool = False) -> int:
    """How much work a grammar is, on the scale of `json_body.LONG`: it is compiled beside the event loop, however
    short."""
    return LONG if options.constrained or compiles else 0


def constraint_of(
    options: Structured, service: Service, *, prefix: str = "", after: Sequence[int] = ()
) -> Constraint | None:
    """What a row has to match, behind the mark `after`; may take long. Raises `InvalidField`, with `prefix` in front of
    the field, for what is no grammar."""
    asked, outputs = options.response_format, options.structured_outputs
    if outputs is not None:
        grammar, place = _of_outputs(outputs, f"{prefix}structured_outputs")
    elif asked is None or asked.type == "text":
        return None
    elif asked.json_schema is None:
        grammar, place = Grammar(GrammarKind.JSON, ANY_OBJECT), f"{prefix}response_format"
    else:
        grammar = Grammar(GrammarKind.JSON, json.dumps(asked.json_schema.schema_, ensure_ascii=False))
        place = f"{prefix}response_format.json_schema.schema"
    return service.engine.compile(replace(grammar, after=tuple(after)), place)


def _of_outputs(outputs: StructuredOutputs, place: str) -> tuple[Grammar, str]:
    """The grammar and the field that it is in."""
    if outputs.regex is not None:
        return Grammar(GrammarKind.REGEX, outputs.regex), f"{place}.regex"
    if outputs.choice is not None:
        return Grammar(GrammarKind.CHOICE, json.dumps(outputs.choice, ensure_ascii=False)), f"{place}.choice"
    if outputs.grammar is not None:
        return Grammar(GrammarKind.GRAMMAR, outputs.grammar), f"{place}.grammar"
    whitespace = "" if outputs.disable_any_whitespace else outputs.whitespace_pattern
    if outputs.json_ is None:
        return Grammar(GrammarKind.JSON, ANY_OBJECT, whitespace), f"{place}.json_object"
    schema = outputs.json_
    if isinstance(schema, str):
        schema = parse_json(schema.encode("utf-8"), param=f"{place}.json")
    return Grammar(GrammarKind.JSON, json.dumps(schema, ensure_ascii=False), whitespace), f"{place}.json"


def check_given(constraint: Constraint, token_ids: Sequence[int], sampled: Sequence[bool], place: str) -> None:
    """A row goes on in its grammar from where the tokens lead that were given to it; `place` is where they are."""
    accepted = constraint.accepted(token_ids)
    # What a row sampled itself and the grammar forbids is for `replay` to tell.
    if accepted < len(token_ids) and not sampled[accepted]:
        raise InvalidField(
            f"{place}[{accepted}] is a token that the grammar does not let come there, and was given to the row: it "
            "must begin a text of the grammar.",
            param=place,
        )


def constraint_of_chat(
    data: ChatRequest, format: ReplyFormat, service: Service, *, thinking: bool
) -> Constraint | None:
    """See `grammars.constraint_of`. `thinking`: the prompt ends inside of reasoning, which is the model's own affair;
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
