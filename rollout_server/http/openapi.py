"""What the OpenAPI document cannot learn from signatures: the table of errors, streams beside whole replies, queries
and headers that routes read by themselves, and the two encodings of a push."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from litestar import Litestar, Request
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    RequestBody,
    Schema,
)
from litestar.routes import HTTPRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rollout_server.http.problems import TABLE
from rollout_server.http.replies.streaming import NDJSON, SSE
from rollout_server.schemas.system import ErrorReply

REFERENCE = "#/components/schemas/{model}"


def _choice(name: str, *values: str) -> Parameter:
    return Parameter(name, "query", Schema(type=OpenAPIType.STRING, enum=list(values)))


def _flag(name: str) -> Parameter:
    return _choice(name, "true", "false", "1", "0")


CONDITION = r'"(?:(0|[1-9][0-9]{0,11})|(sha256:[0-9a-f]{8,64}))"'
"""What `If-Match` says: `"7"`, or `"sha256:…"`."""
IF_MATCH = Parameter(
    "If-Match",
    "header",
    Schema(type=OpenAPIType.STRING, pattern=f"^{CONDITION}$"),
    'The version, `"7"`, or the digest, `"sha256:…"`, at which the name has to be; else 412, and nothing changes.',
)
_OF_MODEL = Schema(
    type=OpenAPIType.STRING,
    min_length=1,
    max_length=256,
    description="The model that is meant, by its name among several; without it that of --model.",
)
MODEL = Parameter("model", "query", _OF_MODEL)


def failures() -> dict[int, ResponseSpec]:
    """Every error status with the codes it can carry."""
    codes: dict[int, list[str]] = {}
    for error, row in TABLE.items():
        codes.setdefault(row.status, []).append(error.code)
    return {
        status: ResponseSpec(ErrorReply, description=", ".join(names), generate_examples=False)
        for status, names in sorted(codes.items())
    }


def _upload_body() -> RequestBody:
    text = Schema(type=OpenAPIType.STRING)
    file = Schema(
        type=OpenAPIType.STRING, content_media_type="application/octet-stream", description="A safetensors file."
    )
    choices = (("format", ("auto", "peft", "mlx")), ("activate", ("true", "false")), ("dequantize", ("false", "true")))
    choice = {name: Schema(type=OpenAPIType.STRING, enum=list(values), default=values[0]) for name, values in choices}
    mode = "How it is served; without it `adapter`, and `merged` for dense versions."
    form = Schema(
        type=OpenAPIType.OBJECT,
        required=["name", "weights"],
        properties={
            "name": text,
            "weights": file,
            "config": Schema(type=OpenAPIType.STRING, description="adapter_config.json of PEFT or mlx-lm."),
            "label": Schema(type=OpenAPIType.STRING, max_length=64),
            "model": _OF_MODEL,
            "mode": Schema(type=OpenAPIType.STRING, enum=["adapter", "merged"], description=mode),
            **choice,
        },
    )
    return RequestBody(
        required=True,
        description="With application/octet-stream the other fields are query parameters; `config` may also stand in "
        "the file's metadata under `adapter_config`.",
        content={
            "multipart/form-data": OpenAPIMediaType(schema=form),
            "application/octet-stream": OpenAPIMediaType(schema=file),
        },
    )


@dataclass
class AskingOperation(Operation):
    """A route that reads its query and headers itself: which ones."""

    asked: ClassVar[tuple[Parameter, ...]] = ()

    def __post_init__(self) -> None:
        self.parameters = [*(self.parameters or ()), *self.asked]


class ModelOperation(AskingOperation):
    """A route about the versions of one model."""

    asked = (MODEL,)


class ActivateOperation(AskingOperation):
    """A route that moves a name."""

    asked = (MODEL, IF_MATCH)


class ExportOperation(AskingOperation):
    """A version as a file."""

    asked = (_choice("format", "peft", "mlx"), MODEL)


class PauseOperation(AskingOperation):
    """vLLM's `/pause`."""

    asked = (_choice("mode", "abort", "wait", "keep"), _flag("clear_cache"), _flag("wait_for_inflight_requests"))


class ResetOperation(AskingOperation):
    """vLLM's `/reset_prefix_cache`."""

    asked = (_flag("reset_running_requests"), _flag("reset_external"))


class UploadOperation(AskingOperation):
    """`POST /v1/weights`, whose body is read as a stream."""

    asked = (IF_MATCH,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.request_body = _upload_body()


def _streamed(operation: Operation, media_type: str, schema: Schema) -> None:
    reply = (operation.responses or {})["200"]
    if isinstance(reply, OpenAPIResponse) and reply.content is not None:
        reply.content = {**reply.content, media_type: OpenAPIMediaType(schema=schema)}


@dataclass
class EventsOperation(Operation):
    """Replies whole, or with `stream` as server-sent events."""

    def __post_init__(self) -> None:
        data = Schema(type=OpenAPIType.STRING, description="JSON; at the end `[DONE]`, or an object with `error`.")
        event = Schema(
            type=OpenAPIType.OBJECT, description="A server-sent event.", required=["data"], properties={"data": data}
        )
        _streamed(self, SSE, event)


@dataclass
class LinesOperation(Operation):
    """Replies whole, or with `stream` as lines of JSON."""

    def __post_init__(self) -> None:
        what = "A line of JSON per rollout; the last has `done`, or holds `error`."
        _streamed(self, NDJSON, Schema(type=OpenAPIType.STRING, description=what))


class ExactJsonPlugin(JsonRenderPlugin):
    """Renders `exact_document` of one application as JSON, once: it takes tenths of a second, and never changes."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json")
        self._rendered: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if self._rendered is None:
            self._rendered = super().render(request, exact_document(request.app, openapi_schema))
        return self._rendered


def exact_document(app: Litestar, drawn: dict[str, Any]) -> dict[str, Any]:
    """Litestar's document, with pydantic's own schemas of the request bodies, since Litestar leaves out that unknown
    fields are refused, and what items of lists must be. The examples that it draws at random for replies go."""
    whole = without_examples(drawn)
    components = whole.get("components", {})
    return {**whole, "components": {**components, "schemas": {**components.get("schemas", {}), **request_schemas(app)}}}


def without_examples(part: Any) -> Any:
    """A part of a document without examples. A field may be called `examples`."""
    if isinstance(part, list):
        return [without_examples(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: {name: without_examples(field) for name, field in value.items()}
        if key == "properties"
        else without_examples(value)
        for key, value in part.items()
        if key != "examples"
    }


def request_schemas(app: Litestar) -> dict[str, Any]:
    """Name → JSON schema of every body that a route reads, and of its parts."""
    handlers = (handler for route in app.routes if isinstance(route, HTTPRoute) for handler in route.route_handlers)
    dtos = (handler.resolve_data_dto() for handler in handlers)
    models = {dto.model_type for dto in dtos if dto is not None and issubclass(dto.model_type, BaseModel)}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, found = models_json_schema([(model, "validation") for model in ordered], ref_template=REFERENCE)
    definitions: dict[str, Any] = found["$defs"]
    return definitions
