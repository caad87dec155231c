"""What a model wrote in the place of tool calls → OpenAI's calls, each of which can be sent back as history."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import Any

from rollout_server.errors import InvalidField, RolloutError
from rollout_server.text.chat_format import ParseToolCall, ReplyFormat
from rollout_server.text.strict_json import parse_json

Tools = list[dict[str, Any]]


def read_calls(
    format: ReplyFormat, text: str, tools: Tools | None, taken: Collection[str] = ()
) -> list[dict[str, Any]] | None:
    """Calls out of the text between the marks; None if it holds none, or one that JSON cannot say or that the server
    would not take back. `taken` are the ids of the reply's earlier calls."""
    parse = format.parse_tool_call
    if parse is None:
        return None
    found = _parsed(parse, text, tools)
    # Some parsers take numbers through float. Told that all is text, they hand out the digits.
    digits = _parsed(parse, text, _declared_text(tools)) if tools else []
    twins = digits if len(digits) == len(found) else found
    calls: list[dict[str, Any]] = []
    for call, twin in zip(found, twins, strict=True):
        function = _function(call, twin)
        if function is None:
            return None
        id = call.get("id")
        if not _printable(id) or id in taken or any(id == other["id"] for other in calls):
            id = f"call_{secrets.token_hex(12)}"
        calls.append({"id": id, "type": "function", "function": function})
    return calls or None


def read_arguments(text: str, place: str) -> dict[str, Any]:
    """The arguments of a call in a conversation, which are JSON text; empty text stands for none. `place` is where they
    are. Raises `InvalidField` or `BadBody`."""
    arguments = parse_json(text.encode() or b"{}", param=place)
    if not isinstance(arguments, dict):
        raise InvalidField(f"{place} must be an object, as JSON text.", param=place)
    return arguments


def _parsed(parse: ParseToolCall, text: str, tools: Tools | None) -> list[Any]:
    """All that the parser takes for calls."""
    try:
        found = parse(text, tools)
    except Exception:  # a parser of mlx-lm promises nothing about text that a model got wrong, and a row only has text
        return []
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def _declared_text(tools: Tools) -> Tools:
    """The same tools, with every parameter declared as text."""
    return [tool | {"function": _of_text(tool["function"])} for tool in tools]


def _of_text(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict) or not isinstance(properties, dict):
        return function
    return function | {"parameters": parameters | {"properties": {name: {"type": "string"} for name in properties}}}


def _function(call: Any, twin: Any) -> dict[str, str] | None:
    """OpenAI's `function` of a parsed call; None if it cannot be one."""
    if not isinstance(call, dict) or not _printable(call.get("name")):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, dict) and isinstance(twin, dict):
        arguments = _with_digits(arguments, twin.get("arguments"))
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        read_arguments(text, "arguments")
    # JSON has no such value, keys of two kinds or nesting without end; or the text is none that can be sent back.
    except (TypeError, ValueError, RecursionError, RolloutError):
        return None
    if not text:
        return None
    return {"name": call["name"], "arguments": text}


def _with_digits(arguments: dict[Any, Any], written: Any) -> dict[Any, Any]:
    """The arguments, integers among them as they were written."""
    if not isinstance(written, dict):
        return arguments
    return {name: _exact(value, written.get(name)) for name, value in arguments.items()}


def _exact(value: Any, written: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(written, str):
        return value
    try:
        number = Decimal(written)
    except InvalidOperation:
        return value
    # An exponent is no digits, and may stand for any number of them.
    whole = number.is_finite() and "e" not in written.lower() and number == number.to_integral_value()
    return int(number) if whole and number != value else value


def _printable(text: Any) -> bool:
    """What can be a name or an id: characters, not only blanks, and no control characters or halves of any."""
    return isinstance(text, str) and bool(text.strip()) and text.isprintable()
