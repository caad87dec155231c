"""What the OpenAPI document cannot learn from signatures: the table of errors, streams beside whole replies, and the
two encodings of a push."""

from __future__ import annotations

from dataclasses import dataclass

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, OpenAPIType, Operation, RequestBody, Schema

from rollout_server.http.problems import TABLE
from rollout_server.http.streaming import NDJSON, SSE
from rollout_server.schemas.system import ErrorReply


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
    file = Schema(type=OpenAPIType.STRING, content_media_type="application/octet-stream", description="safetensors")
    choice = {
        name: Schema(type=OpenAPIType.STRING, enum=list(values), default=values[0])
        for name, values in (("format", ("auto", "peft", "mlx")), ("activate", ("true", "false")))
    }
    form = Schema(
        type=OpenAPIType.OBJECT,
        required=["name", "weights"],
        properties={
            "name": text,
            "weights": file,
            "config": Schema(type=OpenAPIType.STRING, description="adapter_config.json of PEFT or mlx-lm"),
            "label": Schema(type=OpenAPIType.STRING, max_length=64),
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
class UploadOperation(Operation):
    """`POST /v1/weights`, whose body is read as a stream."""

    def __post_init__(self) -> None:
        self.request_body = _upload_body()


def _streamed(operation: Operation, media_type: str, what: str) -> None:
    reply = (operation.responses or {})["200"]
    if isinstance(reply, OpenAPIResponse) and reply.content is not None:
        events = Schema(type=OpenAPIType.STRING, description=what)
        reply.content = {**reply.content, media_type: OpenAPIMediaType(schema=events)}


@dataclass
class EventsOperation(Operation):
    """Replies whole, or with `stream` as server-sent events."""

    def __post_init__(self) -> None:
        _streamed(self, SSE, "Server-sent events; the last is `data: [DONE]`, or holds `error`.")


@dataclass
class LinesOperation(Operation):
    """Replies whole, or with `stream` as lines of JSON."""

    def __post_init__(self) -> None:
        _streamed(self, NDJSON, "A line of JSON per rollout; the last has `done`, or holds `error`.")
