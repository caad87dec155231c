"""`response_format` and `structured_outputs` → the grammar of a row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from rollout_server.errors import InvalidField
from rollout_server.grammar import Constraint, Grammar, GrammarKind
from rollout_server.http.body import LONG
from rollout_server.http.service import Service
from rollout_server.schemas.structured import Structured, StructuredOutputs
from rollout_server.text.strict_json import parse_json

ANY_OBJECT = json.dumps({"type": "object"})


def extra_weight(options: Structured, *, compiles: bool = False) -> int:
    """How much work a grammar is, on the scale of `body.LONG`: it is compiled beside the event loop, however short."""
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


def check_given(constraint: Constraint | None, token_ids: Sequence[int], sampled: Sequence[bool], place: str) -> None:
    """A row goes on in its grammar from where the tokens lead that were given to it; `place` is where they are."""
    if constraint is None:
        return
    accepted = constraint.accepted(token_ids)
    # What a row sampled itself and the grammar forbids is for `replay` to tell.
    if accepted < len(token_ids) and not sampled[accepted]:
        raise InvalidField(
            f"{place}[{accepted}] is a token that the grammar does not let come there, and was given to the row: it "
            "must begin a text of the grammar.",
            param=place,
        )
