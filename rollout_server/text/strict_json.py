"""JSON as a stranger sends it: read strictly, and refused in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from rollout_server.errors import BadBody
from rollout_server.quoting import quoted

MAX_DEPTH = 64
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(body: bytes, *, param: str | None = None) -> Any:
    """Strict JSON: UTF-8, no duplicate names, no NaN, no lone surrogates, at most `MAX_DEPTH` levels. `param` is the
    field it came in, if it was not the whole body."""
    what = param or "The body"
    if not body.strip():
        raise BadBody(f"{what} is empty; a JSON object was expected.", param=param)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadBody(f"{what} is not UTF-8 (byte {error.start}).", param=param) from error
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except _Refused as refused:
        raise BadBody(f"{what} is not JSON that can be used: {refused}", param=param) from refused
    except json.JSONDecodeError as error:
        raise BadBody(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", param=param
        ) from error
    except RecursionError as error:
        raise BadBody(f"{what} is nested deeper than {MAX_DEPTH} levels.", param=param) from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise BadBody(f"{what} holds a number of thousands of digits.", param=param) from error
    if _deeper_than(value, MAX_DEPTH):
        raise BadBody(f"{what} is nested deeper than {MAX_DEPTH} levels.", param=param)
    if SURROGATE_ESCAPE.search(body):
        _refuse_lone_surrogates(value, param)
    return value


class _Refused(ValueError):
    """Raised by the hooks of `json.loads`."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Refused(f"the field {quoted(twice)} is there twice.")
    return members


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON; leave the field out or send a number.")


def _deeper_than(value: Any, levels: int) -> bool:
    """Returns whether containers are nested deeper than `levels`; looks at containers only, level by level."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return False
    return True


def _containers(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    inside = value.values() if isinstance(value, dict) else value
    # A list of a million token ids is looked at once and holds no container.
    return (item for item in inside if isinstance(item, (dict, list)))


def _refuse_lone_surrogates(value: Any, param: str | None) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadBody(
            f"{param or 'The body'} holds half of a surrogate pair, which is no character.", param=param
        ) from error
