"""The one table from error class to status, and the one body every error travels in.

{"error": {"message", "type", "param", "code", "retryable"}}        header x-should-retry
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from litestar import Request, Response
from litestar import exceptions as litestar_errors
from pydantic import ValidationError

from adapters import spec as adapter_errors
from rollout_server import errors
from rollout_server.errors import RolloutError
from rollout_server.rollout import PolicyVersion
from rollout_server.schemas.fields import UNSUPPORTED

log = logging.getLogger("rollout_server.http")

MESSAGES_SHOWN = 5
RESOLVED = "resolved_policy"
"""Key of the request's state under which the policy version it resolved to is kept."""


class Row(NamedTuple):
    status: int
    type: str


REQUEST, PERMISSION, MISSING, SERVER = (
    "invalid_request_error",
    "permission_error",
    "not_found_error",
    "server_error",
)

TABLE: Mapping[type[RolloutError], Row] = MappingProxyType(
    {
        errors.InvalidField: Row(400, REQUEST),
        errors.UnsupportedField: Row(400, REQUEST),
        errors.ContextExceeded: Row(400, REQUEST),
        errors.BadBody: Row(400, REQUEST),
        errors.BodyTooLarge: Row(413, REQUEST),
        errors.UnsupportedMedia: Row(415, REQUEST),
        errors.Unauthorized: Row(401, "authentication_error"),
        errors.Forbidden: Row(403, PERMISSION),
        errors.NotFound: Row(404, MISSING),
        errors.MethodNotAllowed: Row(405, REQUEST),
        errors.UnknownPolicy: Row(404, MISSING),
        errors.VersionGone: Row(409, "conflict_error"),
        errors.StalePolicy: Row(409, "conflict_error"),
        errors.Conflict: Row(409, "conflict_error"),
        errors.PreconditionFailed: Row(412, "conflict_error"),
        errors.AdapterInvalid: Row(422, REQUEST),
        errors.AdapterMismatch: Row(422, REQUEST),
        errors.WeightsMemoryExceeded: Row(507, SERVER),
        errors.StorageFailed: Row(507, SERVER),
        errors.QueueFull: Row(429, "rate_limit_error"),
        errors.NeverAdmitted: Row(408, "timeout_error"),
        errors.EngineUnavailable: Row(503, SERVER),
        errors.EngineFault: Row(500, SERVER),
        errors.NonFiniteLogits: Row(500, SERVER),
    }
)


def subclasses(cls: type[RolloutError] = RolloutError) -> Iterator[type[RolloutError]]:
    """Every error class below `cls`, once each."""
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def error_of_row(code: str, message: str) -> RolloutError:
    """The error a failed row names, as the class with that code; an unknown code is an engine fault."""
    for cls in subclasses(errors.EngineFault):
        if cls.code == code:
            return cls(message)
    return errors.EngineFault(message)


def place(loc: tuple[int | str, ...]) -> str:
    """Where in the body, as text: `prompts[0].token_ids[3]`. Tags of unions, `<…>`, are no part of it."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            path += f".{step}" if path else step
    return path


def from_validation(error: ValidationError) -> RolloutError:
    """A body that is JSON and no request. Names the first fault in `param`, and the first few in the message."""
    sentences: list[str] = []
    param = None
    cls: type[RolloutError] = errors.InvalidField
    for position, fault in enumerate(error.errors(include_url=False)):
        context = fault.get("ctx") or {}
        loc = (*fault["loc"], context["field"]) if context.get("field") else fault["loc"]
        where = place(loc)
        if position == 0:
            param = where or None
            cls = errors.UnsupportedField if fault["type"] == UNSUPPORTED else errors.InvalidField
        if position < MESSAGES_SHOWN:
            sentences.append(_sentence(where, fault))
    left = error.error_count() - len(sentences)
    if left > 0:
        sentences.append(f"And {left} more.")
    return cls(" ".join(sentences), param=param)


def _sentence(where: str, fault: Any) -> str:
    kind, said = fault["type"], str(fault["msg"]).rstrip(".")
    if kind == "extra_forbidden":
        return f"Unknown field {where!r}."
    if kind == "missing":
        return f"{where!r} is required."
    if kind.endswith(("_type", "_parsing")) or kind in ("literal_error", "string_unicode", "finite_number"):
        return f"{where or 'The body'}: {said}, not {_short(fault.get('input'))}."
    return f"{where}: {said}." if where else f"{said}."


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "…"


def from_adapters(error: adapter_errors.AdapterError) -> RolloutError:
    """The adapters' errors in the words of the server's tree."""
    message = str(error)
    if isinstance(error, adapter_errors.AdapterDoesNotFit):
        return errors.AdapterMismatch(message, faults=error.faults, param="weights")
    if isinstance(error, adapter_errors.AdapterUnsupported):
        return errors.UnsupportedField(message, param=f"config.{error.fields[0]}" if error.fields else "config")
    return errors.AdapterInvalid(message, param="weights")


def from_litestar(error: litestar_errors.HTTPException) -> RolloutError:
    """The framework's own refusals."""
    match error:
        case litestar_errors.NotFoundException():
            return errors.NotFound("There is no such route. GET /schema lists what there is.")
        case litestar_errors.MethodNotAllowedException():
            return errors.MethodNotAllowed("This route does not answer to this method.")
        case litestar_errors.ValidationException():
            # Nothing but the body is validated by the framework, and of that only whether it is there.
            return errors.BadBody("The body is empty; a JSON object was expected.")
        case litestar_errors.InternalServerException():
            return errors.EngineFault("The server failed to handle this request.")
    if error.status_code == 413:
        return errors.BodyTooLarge("The body is larger than this server takes (--max-body).")
    if error.status_code == 415:
        return errors.UnsupportedMedia(error.detail)
    return errors.BadBody(error.detail or "The request cannot be read.")


def as_rollout_error(error: Exception) -> RolloutError:
    """Any exception as one of ours; a stranger is a fault of the server and is logged with its trace."""
    match error:
        case RolloutError():
            return error
        case ValidationError():
            return from_validation(error)
        case adapter_errors.AdapterError():
            return from_adapters(error)
        case litestar_errors.HTTPException():
            return from_litestar(error)
    log.error("A request failed in a way nobody foresaw.", exc_info=error)
    return errors.EngineFault("The server failed to handle this request; its log says why.")


def row_of(error: RolloutError) -> Row:
    """The table's row for the class or the nearest one above it."""
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), Row(500, SERVER))


def body_of(error: RolloutError, resolved: PolicyVersion | None = None) -> dict[str, Any]:
    """`{"error": …}`, with the policy version the request had resolved to, if any."""
    problem: dict[str, Any] = {
        "message": error.message,
        "type": row_of(error).type,
        "param": error.param,
        "code": error.code,
        "retryable": error.retryable,
    }
    if isinstance(error, errors.AdapterMismatch):
        problem["faults"] = list(error.faults)
    if resolved is not None:
        problem |= {"policy": resolved.name, "version": resolved.number, "digest": resolved.digest}
    return {"error": problem}


def to_response(request: Request[Any, Any, Any], exception: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    error = as_rollout_error(exception)
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, errors.QueueFull):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, errors.Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, errors.MethodNotAllowed) and isinstance(exception, litestar_errors.HTTPException):
        headers |= {name: value for name, value in (exception.headers or {}).items() if name.lower() == "allow"}
    resolved = request.scope.get("state", {}).get(RESOLVED)
    return Response(
        content=msgspec.json.encode(body_of(error, resolved)),
        status_code=row_of(error).status,
        headers=headers,
        media_type="application/json",
    )
