"""`python -m tests.docs.api_page`: docs/api.md, written from the document that a server gives of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rollout_server.config import ServerConfig
from rollout_server.http.app import create_app
from rollout_server.http.openapi import exact_document
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = """# HTTP reference

<!-- Written by `make api` from the server's own document; changes go there. -->

Every route with what it reads and answers. A running server has the same at `/schema` as a page to try it on, and at
`/schema/openapi.json` as a document. What routes are for is said in [the guide](guide/README.md#the-api-at-a-glance).
Every error has the body of `ErrorReply`, and a `code` with [its paragraph](troubleshooting.md).
"""
TITLES: Mapping[str, str] = {
    "rollouts": "Rollouts",
    "logprobs": "Log-probabilities",
    "weights": "Weights",
    "openai": "OpenAI's routes",
    "pooling": "Scores, classes, ranks and rewards",
    "tokens": "Tokens",
    "control": "Control",
    "vllm": "vLLM's doors",
    "fleet": "Fleet",
    "system": "Health and metrics",
}
"""Tags of routes → headings, in the order of the page."""


def main() -> None:
    PAGE.write_text(written(document()), encoding="utf-8")


def document() -> dict[str, Any]:
    """What a server gives at /schema/openapi.json."""
    app = create_app(ServerConfig())
    return exact_document(app, app.openapi_schema.to_schema())


def written(api: Mapping[str, Any]) -> str:
    """The page."""
    schemas = api["components"]["schemas"]
    routes = [
        (path, method, operation) for path, methods in api["paths"].items() for method, operation in methods.items()
    ]
    unknown = {tag for *_, operation in routes for tag in operation["tags"]} - TITLES.keys()
    if unknown:
        raise ValueError(f"TITLES of {__name__} has no heading for routes with the tag {', '.join(sorted(unknown))}.")
    parts = [INTRODUCTION]
    for tag, title in TITLES.items():
        parts.append(f"## {title}\n")
        own = sorted((path, method, operation) for path, method, operation in routes if tag in operation["tags"])
        parts += [route(path, method, operation) for path, method, operation in own]
    asked = reached((operation.get("requestBody") for *_, operation in routes), schemas)
    answered = reached((operation["responses"] for *_, operation in routes), schemas) - asked
    parts.append("## What is sent\n")
    parts += [model(name, schemas[name], sent=True) for name in sorted(asked)]
    parts.append("## What comes back\n")
    parts += [model(name, schemas[name], sent=False) for name in sorted(answered)]
    return "\n".join(parts)


def route(path: str, method: str, operation: Mapping[str, Any]) -> str:
    lines = [f"### `{method.upper()} {path}`\n", sentence(operation["summary"])]
    if said := operation.get("description"):
        lines.append(text(said))
    reads = operation.get("requestBody", {})
    if said := reads.get("description"):
        lines.append(text(said))
    body = reads.get("content", {})
    lines += [""]
    lines += [asked(parameter) for parameter in operation.get("parameters", []) if parameter["in"] != "path"]
    lines += [f"- reads {kind(media)}{of(content)}" for media, content in body.items()]
    for status, reply in operation["responses"].items():
        if status.startswith("2"):
            media = reply.get("content", {})
            lines += [f"- {status}: {kind(name)}{of(content)}" for name, content in media.items()]
    inline = [content["schema"] for content in body.values() if "properties" in content.get("schema", {})]
    lines += [line for schema in inline for line in ("", *table(schema, sent=True))]
    return "\n".join(lines) + "\n"


def asked(parameter: Mapping[str, Any]) -> str:
    """What a route takes beside its body."""
    where = "header" if parameter["in"] == "header" else "query"
    schema = parameter["schema"]
    said = " ".join(filter(None, [text(parameter.get("description", "")), about(schema, parameter["required"])]))
    return f"- {where} `{parameter['name']}`: {shape(schema)}{f'. {said}' if said else ''}"


def sentence(words: str) -> str:
    return text(words).removesuffix(".") + "."


def text(words: str) -> str:
    """As one line that Markdown leaves as it is."""
    return re.sub(r"\s+", " ", words.replace("|", "\\|")).strip()


def kind(media: str) -> str:
    return f"`{media.partition(';')[0]}`"


def of(content: Mapping[str, Any]) -> str:
    """What the body is, where that has a name."""
    names = list(references(content.get("schema", {})))
    return ", " + ", ".join(f"[{name}](#{name.lower()})" for name in names) if names else ""


def references(schema: Any) -> Iterator[str]:
    """The names of models that a schema mentions, in order, each once for every mention."""
    parts = schema.items() if isinstance(schema, Mapping) else enumerate(schema) if isinstance(schema, list) else ()
    for key, part in parts:
        if key == "$ref":
            yield part.rpartition("/")[2]
        else:
            yield from references(part)


def reached(parts: Iterable[Any], schemas: Mapping[str, Any]) -> set[str]:
    """The models that these parts of the document mention, with the models of their fields."""
    left = {name for part in parts for name in references(part)}
    found: set[str] = set()
    while left:
        name = left.pop()
        found.add(name)
        left |= set(references(schemas[name])) - found
    return found


def model(name: str, schema: Mapping[str, Any], *, sent: bool) -> str:
    lines = [f"### `{name}`\n"]
    if said := schema.get("description"):
        lines += [text(said), ""]
    if "properties" not in schema:
        return "\n".join([*lines, f"{shape(schema)}.\n"])
    return "\n".join([*lines, *table(schema, sent=sent)]) + "\n"


def table(schema: Mapping[str, Any], *, sent: bool) -> list[str]:
    """The fields of a schema, in lines of a table."""
    required = schema.get("required", []) if sent else []
    fields = schema["properties"].items()
    return [
        "| field | is | |",
        "|---|---|---|",
        *(f"| `{field}` | {shape(own)} | {about(own, field in required)} |" for field, own in fields),
    ]


def about(schema: Mapping[str, Any], required: bool) -> str:
    """What is said of a field, and what it is without being given."""
    inner = schema
    if not schema.get("description"):
        inner = next((part for part in schema.get("anyOf", schema.get("oneOf", [])) if part.get("description")), schema)
    words = [text(str(inner.get("description", "")))]
    default = schema.get("default")
    if required:
        words.append("Required.")
    elif default is not None and not isinstance(default, dict | list):
        words.append(f"Default `{text(json.dumps(default))}`.")
    return " ".join(filter(None, words))


def shape(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema and not schema.get("properties"):
            return " or ".join(dict.fromkeys(shape(part) for part in schema[several]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    found = schema.get("type", "anything")
    if found == "array":
        return f"list of {shape(schema.get('items', {}))}"
    if isinstance(found, list):
        return " or ".join(found)
    return found + bounds(schema)


def bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {number(schema[name])}" for name, sign in signs.items() if name in schema]
    return f" {', '.join(found)}".replace("<", "\\<") if found else ""


def number(value: float) -> str:
    return "2⁵³ − 1" if value == 2**53 - 1 else f"{value:,}"


if __name__ == "__main__":
    main()
