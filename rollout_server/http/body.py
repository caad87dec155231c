"""Request bodies: read within a limit, parsed strictly."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any, TypeVar

from litestar import Request
from litestar.dto import AbstractDTO
from litestar.dto.data_structures import DTOFieldDefinition
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition
from pydantic import BaseModel

from rollout_server.errors import BadBody, BodyTooLarge, UnsupportedField, UnsupportedMedia

T = TypeVar("T", bound=BaseModel)

MAX_DEPTH = 64
SAFETENSORS = "application/vnd.safetensors"
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def refuse_binary_reply(request: Request[Any, Any, Any]) -> None:
    """The contract's binary encoding is not served yet; who accepts JSON as well gets JSON."""
    accepted = {item.partition(";")[0].strip().lower() for item in request.headers.get("accept", "").split(",")}
    if SAFETENSORS in accepted and not accepted & {"application/json", "application/*", "*/*"}:
        raise UnsupportedField(f"Replies as {SAFETENSORS} are not supported by this server yet.", param="Accept")


async def chunks(request: Request[Any, Any, Any], limit: int, option: str) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises `BodyTooLarge` as soon as more than `limit` bytes are announced or read."""
    too_large = BodyTooLarge(f"The body is larger than the {limit} bytes that {option} allows.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    read = 0
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise BadBody("The connection was closed before the body was complete.")
        read += len(message["body"])
        if read > limit:
            raise too_large
        if message["body"]:
            yield message["body"]
        if not message.get("more_body", False):
            return


def parse_json(body: bytes, *, param: str | None = None) -> Any:
    """Strict JSON: UTF-8, no duplicate names, no NaN, no lone surrogates, at most `MAX_DEPTH` levels."""
    if not body.strip():
        raise BadBody("The body is empty; a JSON object was expected.", param=param)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadBody(f"The JSON is not UTF-8 (byte {error.start}).", param=param) from error
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except _Refused as refused:
        raise BadBody(str(refused), param=param) from refused
    except json.JSONDecodeError as error:
        raise BadBody(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.", param=param
        ) from error
    except RecursionError as error:
        raise BadBody(f"The JSON is nested deeper than {MAX_DEPTH} levels.", param=param) from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadBody(f"The JSON holds a number nobody can mean: {error}.", param=param) from error
    if _deeper_than(value, MAX_DEPTH):
        raise BadBody(f"The JSON is nested deeper than {MAX_DEPTH} levels.", param=param)
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
        raise _Refused(f"The field {twice!a} is there twice.")
    return members


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON; leave the field out or send a number.")


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether containers are nested deeper than `levels`; looks at containers only, level by level."""
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
        raise BadBody("The JSON holds half of a surrogate pair, which is no character.", param=param) from error


class StrictJson(AbstractDTO[T]):
    """`@post(dto=StrictJson[Model])`: Litestar reads the body within its limit and documents `Model`; parsing and
    validation are ours."""

    def decode_bytes(self, value: bytes) -> T:
        media_type = self.asgi_connection.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise UnsupportedMedia(
                f"This route reads application/json, not {media_type or 'a body without a content type'}.",
                param="Content-Type",
            )
        return self.model_type.model_validate(parse_json(value))

    def decode_builtins(self, value: dict[str, Any]) -> T:
        return self.model_type.model_validate(value)

    def data_to_encodable_type(self, data: Any) -> Any:
        return data

    @classmethod
    def generate_field_definitions(cls, model_type: type[Any]) -> Generator[DTOFieldDefinition, None, None]:
        yield from ()

    @classmethod
    def detect_nested_field(cls, field_definition: FieldDefinition) -> bool:
        return False

    @classmethod
    def create_for_field_definition(
        cls, field_definition: FieldDefinition, handler_id: str, backend_cls: Any = None
    ) -> None:
        """Nothing to prepare: there are no transfer models."""

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: Any
    ) -> Schema | Reference:
        schema: Schema | Reference = schema_creator.for_field_definition(field_definition)
        return schema
