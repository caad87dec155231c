"""Request bodies: read within a limit, parsed strictly, and off the event loop where they are long."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, TypeVar

from litestar import Request
from litestar.dto import AbstractDTO
from litestar.dto.data_structures import DTOFieldDefinition
from litestar.openapi.spec import Reference, Schema
from litestar.typing import FieldDefinition
from pydantic import BaseModel

from rollout_server.errors import BadBody, BodyTooLarge, InvalidField, UnsupportedField, UnsupportedMedia
from rollout_server.http.service import service_of
from rollout_server.quoting import quoted, shortened
from rollout_server.text.strict_json import parse_json

T = TypeVar("T", bound=BaseModel)
R = TypeVar("R")
SAFETENSORS = "application/vnd.safetensors"
LONG = 32_768
"""A request whose body has this many bytes, or that has this many rows, is worked on beside the event loop."""
PARSED = "parsed_body"
"""Key of the request's state under which `read_json` leaves the validated body."""
QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")


def wants_binary(request: Request[Any, Any, Any], *, stream: bool = False) -> bool:
    """Returns whether the reply is to be safetensors: where it is named in `Accept` and JSON is not liked better. A
    stream is JSON in any case; who accepts nothing but safetensors is told so."""
    liked = _accepted(request.headers.get("accept", ""))
    json_liked = next((liked[kind] for kind in ("application/json", "application/*", "*/*") if kind in liked), 0.0)
    binary_liked = liked.get(SAFETENSORS, 0.0)
    if stream and binary_liked > 0 and json_liked == 0:
        raise UnsupportedField(
            f"A stream is lines of JSON, not {SAFETENSORS}: leave out stream, or accept application/json.",
            param="Accept",
        )
    return not stream and binary_liked > 0 and binary_liked >= json_liked


def _accepted(header: str) -> dict[str, float]:
    """Media types with their quality, 1 where none is given or what is given is no number."""
    liked: dict[str, float] = {}
    for item in header.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        liked[kind] = float(quality) if QUALITY.fullmatch(quality) else 1.0
    return liked


def refuse_query(request: Request[Any, Any, Any]) -> None:
    """Raises `InvalidField` for any query; for routes that take none."""
    name = next(iter(request.query_params), None)
    if name is not None:
        raise InvalidField(f"This route takes no query parameters, so not {quoted(name)}.", param=shortened(name))


async def no_query(request: Request[Any, Any, Any]) -> None:
    """Litestar's `before_request` of routes that read nothing but their path."""
    refuse_query(request)


async def beside(weight: int, work: Callable[[], R]) -> R:
    """`work()`: here if it is light, else on another thread, so that the server goes on answering."""
    return await asyncio.to_thread(work) if weight >= LONG else work()


async def chunks(request: Request[Any, Any, Any], limit: int, option: str) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises `BodyTooLarge` as soon as more than `limit` bytes are announced or read, and
    `UnsupportedMedia` for a compressed one."""
    encoding = request.headers.get("content-encoding", "").strip()
    if encoding.lower() not in ("", "identity"):
        raise UnsupportedMedia(
            f"Bodies are read as they are, not with Content-Encoding {quoted(encoding)}.", param="Content-Encoding"
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit, option)
    read = 0
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise BadBody("The connection was closed before the body was complete.")
        read += len(message["body"])
        if read > limit:
            raise _too_large(limit, option)
        if message["body"]:
            yield message["body"]
        if not message.get("more_body", False):
            return


def _too_large(limit: int, option: str) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than the {limit} bytes that {option} allows.")


class WholeRequest(Request[Any, Any, Any]):
    """Litestar's request, whose `body` is read by `chunks`: our limit, our sentences, and a client that leaves is no
    fault of the server."""

    _whole: bytes | None = None

    async def body(self) -> bytes:
        if self._whole is None:
            limit = service_of(self).config.max_body
            self._whole = b"".join([chunk async for chunk in chunks(self, limit, "--max-body")])
        return self._whole


async def read_json(request: Request[Any, Any, Any]) -> None:
    """Litestar's `before_request` of routes with `StrictJson`: reads, parses and validates the body, so that a long one
    does not hold the event loop as the DTO, which cannot wait, would."""
    refuse_query(request)
    await read_body(request)


async def read_body(request: Request[Any, Any, Any]) -> None:
    """The same for routes that read their query themselves."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        found = quoted(media_type) if media_type else "a body without a content type"
        raise UnsupportedMedia(f"This route reads application/json, not {found}.", param="Content-Type")
    dto = request.route_handler.resolve_data_dto()
    if dto is None:
        raise TypeError("A route that reads JSON lacks dto=StrictJson[…].")
    model = dto.model_type
    body = await request.body()
    request.scope["state"][PARSED] = await beside(len(body), lambda: model.model_validate(parse_json(body)))


class StrictJson(AbstractDTO[T]):
    """`@post(before_request=read_json, dto=StrictJson[Model])`: `read_json` does the work, Litestar documents it."""

    def decode_bytes(self, value: bytes) -> T:
        parsed = self.asgi_connection.scope["state"][PARSED]
        if not isinstance(parsed, self.model_type):
            raise TypeError("This route lacks before_request=read_json.")
        return parsed

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
