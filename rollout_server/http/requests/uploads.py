"""The two encodings of `POST /v1/weights`, read as they arrive and never past the limit."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from litestar import Request
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser

from adapters.numerics import joined
from rollout_server.errors import BadBody, BodyTooLarge, InvalidField, UnsupportedMedia
from rollout_server.http.requests.json_body import chunks
from rollout_server.quoting import quoted, shortened
from rollout_server.schemas.weights import WeightsOptions
from rollout_server.text.strict_json import parse_json

OPTION = "--max-upload"
MAX_PARTS = 32
MAX_CONFIG = 8 * 2**20
MAX_FIELD = 4096
PIECE = 16_384
"""A piece of a body that has this many bytes is kept as it came."""
REASON = 200
"""The most characters that are repeated of what the parser says."""
BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE)


@dataclass(slots=True)
class Pieces:
    """The bytes of a body, each piece where it came until all are wanted: copying them into one buffer as they come
    would hold up the connection, and the event loop."""

    length: int = 0
    _pieces: list[bytes | bytearray] = field(default_factory=list)
    _small: bytearray | None = None
    """The last piece, if it may grow."""

    def add(self, data: bytes | bytearray) -> None:
        """Keeps `data` itself unless it is small: byte by byte, a body would take fifty times its length."""
        self.length += len(data)
        if len(data) >= PIECE:
            self._pieces.append(data)
            self._small = None
            return
        if self._small is None or len(self._small) >= PIECE:
            self._small = bytearray()
            self._pieces.append(self._small)
        self._small += data

    def take(self) -> bytes:
        """All bytes in one; nothing is left here."""
        return b"".join(self._taken())

    def joined(self) -> memoryview:
        """All bytes in one, as `take` gives them, for many megabytes: other threads run while they are copied."""
        return joined(self._taken())

    def _taken(self) -> list[bytes | bytearray]:
        taken, self._pieces, self._small, self.length = self._pieces, [], None, 0
        return taken


@dataclass(frozen=True, slots=True)
class Upload:
    options: WeightsOptions
    weights: Pieces
    """The bytes of a safetensors file; to be taken once, beside the event loop."""
    config: dict[str, Any] | None
    """None where it is to be looked for in the file's metadata."""


async def read_upload(request: Request[Any, Any, Any], limit: int) -> Upload:
    """Raises `BodyTooLarge`, `UnsupportedMedia`, `BadBody`, `InvalidField` or pydantic's ValidationError."""
    content_type = request.headers.get("content-type", "")
    match content_type.partition(";")[0].strip().lower():
        case "application/octet-stream":
            return await _read_stream(request, limit)
        case "multipart/form-data":
            return await _read_form(request, content_type, limit)
        case other:
            raise UnsupportedMedia(
                "Weights travel as multipart/form-data or application/octet-stream, not as "
                f"{quoted(other) if other else 'a body without a content type'}.",
                param="Content-Type",
            )


def _query(request: Request[Any, Any, Any]) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in options:
            raise InvalidField(f"The query has {quoted(name)} twice.", param=shortened(name))
        options[name] = value
    return options


async def _read_stream(request: Request[Any, Any, Any], limit: int) -> Upload:
    fields = _query(request)
    config = config_of(fields.pop("config").encode()) if "config" in fields else None
    # Checked before the body is read: a wrong option should not cost an upload.
    options = WeightsOptions.model_validate(fields)
    weights = Pieces()
    async for chunk in chunks(request, limit, OPTION):
        weights.add(chunk)
    return Upload(options, _whole(weights), config)


def config_of(raw: bytes) -> dict[str, Any]:
    config = parse_json(raw, param="config")
    if not isinstance(config, dict):
        raise InvalidField("config must be a JSON object, as adapter_config.json is.", param="config")
    return config


def _whole(weights: Pieces) -> Pieces:
    if not weights.length:
        raise BadBody("The weights are empty; a safetensors file was expected.", param="weights")
    return weights


# ---- multipart ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Form:
    """Parts read so far."""

    fields: dict[str, Pieces] = field(default_factory=dict)
    current: Pieces | None = None
    room: int = 0
    name: str = ""

    def open(self, name: str, limit: int) -> None:
        if not name:
            raise BadBody("A part of the form has no name: send name, weights, config and the options by name.")
        if name in self.fields:
            raise InvalidField(f"The form has {quoted(name)} twice.", param=shortened(name))
        if name not in ("weights", "config", *WeightsOptions.model_fields):
            raise InvalidField(f"{quoted(name)} is no field of a push.", param=shortened(name))
        self.name = name
        self.room = {"weights": limit, "config": MAX_CONFIG}.get(name, MAX_FIELD)
        self.current = self.fields[name] = Pieces()

    def add(self, data: bytes | bytearray) -> None:
        if self.current is None:
            raise BadBody("The form has data outside of its parts.")
        if self.current.length + len(data) > self.room:
            option = f" ({OPTION})" if self.name == "weights" else ""
            raise BodyTooLarge(
                f"The form field {self.name!r} is larger than {self.room} bytes{option}.", param=self.name
            )
        self.current.add(data)


async def _read_form(request: Request[Any, Any, Any], content_type: str, limit: int) -> Upload:
    if wrong := next(iter(_query(request)), None):
        raise InvalidField(
            f"With multipart/form-data, {quoted(wrong)} belongs into the form, not the query.", param=shortened(wrong)
        )
    boundary = BOUNDARY.search(content_type)
    if boundary is None:
        raise BadBody("The multipart content type names no boundary.", param="Content-Type")
    form = _Form()
    try:
        await _parse_form(chunks(request, limit, OPTION), boundary[1] or boundary[2], form, limit)
    except ParserLimitReached as error:
        raise BodyTooLarge(
            f"The form has too many parts, or headers that are too long: {shortened(str(error), REASON)}."
        ) from error
    except MultipartError as error:
        raise BadBody(f"The body is not multipart/form-data: {shortened(str(error), REASON)}.") from error
    parts = form.fields
    if "weights" not in parts:
        raise InvalidField("'weights' is required: the safetensors file.", param="weights")
    config = config_of(parts["config"].take()) if "config" in parts else None
    options = {name: _text(name, raw.take()) for name, raw in parts.items() if name not in ("weights", "config")}
    return Upload(WeightsOptions.model_validate(options), _whole(parts["weights"]), config)


async def _parse_form(body: AsyncIterator[bytes], boundary: str, form: _Form, limit: int) -> None:
    with PushMultipartParser(boundary, max_segment_count=MAX_PARTS, content_length=-1) as parser:
        async for chunk in body:
            for event in parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    form.open(event.name, limit)
                elif event:
                    form.add(event)
                else:
                    form.current = None


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidField(f"The form field {name!r} is not UTF-8 text.", param=name) from error
