"""The one table from error class to status, and the one body every error travels in.

{"error": {"message", "type", "param", "code", "retryable"}}        header x-should-retry
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from litestar import Request, Response
from litestar import exceptions as litestar_errors
from pydantic import ValidationError

from adapters.errors import AdapterError
from rollout_server import errors
from rollout_server.adapter_errors import from_adapters
from rollout_server.errors import RolloutError
from rollout_server.quoting import counted, quoted, shortened
from rollout_server.rollout import PolicyVersion
from rollout_server.schemas.fields import ID_RULE, UNSUPPORTED

log = logging.getLogger("rollout_server.http")

MESSAGES_SHOWN = 5
MESSAGE_LIMIT = 4000
"""The most characters of a message."""
PARAM_LIMIT = 256
LENGTHS = frozenset({"string_too_short", "string_too_long", "too_short", "too_long"})
RULES: Mapping[str, str] = MappingProxyType(
    {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "int_parsing": "a whole number",
        "int_parsing_size": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "string_type": "text",
        "string_unicode": "text",
        "list_type": "a list",
        "dict_type": "an object",
        "model_type": "an object",
        "model_attributes_type": "an object",
        "greater_than": "above {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}",
        "less_than_equal": "at most {le}",
        "literal_error": "{expected}",
    }
)
"""Types of pydantic's errors → what the value must be."""
RESOLVED = "resolved_policy"
"""Key of the request's state under which the policy version it resolved to is kept."""


REFUSED = "refused"
"""Key of the request's state under which the code of the error that it was answered with is kept."""


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
        errors.EngineEnded: Row(503, SERVER),
        errors.EngineFault: Row(500, SERVER),
        errors.ReplicaLost: Row(500, SERVER),
        errors.NonFiniteLogits: Row(500, SERVER),
        errors.GrammarFault: Row(500, SERVER),
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
    """A place in the body as text: `prompts[0].token_ids[3]`. Tags of unions, `<…>`, are no part of it."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (step.startswith("<") and step.endswith(">")):
            name = shortened(step)
            path += f".{name}" if path else name
    return path


def from_validation(error: ValidationError) -> RolloutError:
    """A body that is JSON and no request. Names the first fault in `param`, and the first few in the message."""
    sentences: list[str] = []
    param = None
    cls: type[RolloutError] = errors.InvalidField
    for position, fault in enumerate(error.errors(include_url=False)[:MESSAGES_SHOWN]):
        context = fault.get("ctx") or {}
        inside = () if context.get("field", "") == "" else (context["field"],)
        where = place((*fault["loc"], *inside))
        if position == 0:
            param = where or None
            cls = errors.UnsupportedField if fault["type"] == UNSUPPORTED else errors.InvalidField
        sentences.append(f"{where or 'The body'} {said_of(fault)}.")
    left = error.error_count() - len(sentences)
    if left > 0:
        sentences.append(f"And {left} more.")
    return cls(" ".join(sentences), param=param)


def said_of(fault: Any) -> str:
    """The sentence about one fault of pydantic's, without the place that it begins with."""
    kind, context = fault["type"], fault.get("ctx") or {}
    if kind == "extra_forbidden":
        return "is an unknown field"
    if kind == "missing":
        return "is required"
    if kind == "string_pattern_mismatch":
        return f"must be {ID_RULE}"
    if kind in LENGTHS:
        noun = "character" if kind.startswith("string_") else "item"
        bound = context["min_length" if kind.endswith("short") else "max_length"]
        return "must not be empty" if kind.endswith("short") else f"must have at most {counted(bound, noun)}"
    if rule := RULES.get(kind):
        return f"must be {rule.format_map(context)}, not {quoted(fault.get('input'))}"
    # The validators of our own schemas speak in this form already.
    return str(fault["msg"]).rstrip(".")


@contextmanager
def renamed(fields: Mapping[str, str]) -> Iterator[None]:
    """Errors from within name the field as the route calls it: `fields` maps the engine's names to these."""
    try:
        yield
    except RolloutError as error:
        if error.param is not None:
            error.param = fields.get(error.param, error.param)
        raise


def from_litestar(error: litestar_errors.HTTPException) -> RolloutError:
    """The framework's own refusals."""
    match error:
        case litestar_errors.NotFoundException():
            return errors.NotFound("There is no such route. GET /schema lists what there is.")
        case litestar_errors.MethodNotAllowedException():
            return errors.MethodNotAllowed("This route does not answer to this method.")
        case litestar_errors.ValidationException():
            return errors.BadBody("The request cannot be read.")
        case litestar_errors.InternalServerException():
            return errors.EngineFault("The server failed to handle this request.")
    if error.status_code == 413:
        return errors.BodyTooLarge("The body is larger than this server takes (--max-body).")
    if error.status_code == 415:
        return errors.UnsupportedMedia(error.detail)
    return errors.BadBody(error.detail or "The request cannot be read.")


def as_rollout_error(error: Exception) -> RolloutError:
    """Any exception as one of ours. An unknown one is a fault of the server, and is logged with its trace."""
    match error:
        case RolloutError():
            return error
        case ValidationError():
            return from_validation(error)
        case AdapterError():
            return from_adapters(error)
        case litestar_errors.HTTPException():
            return from_litestar(error)
    log.error("Unhandled exception while serving a request.", exc_info=error)
    return errors.EngineFault("The server failed to handle this request; its log says why.")


def row_of(error: RolloutError) -> Row:
    """The table's row for the class or the nearest one above it."""
    return next((TABLE[cls] for cls in type(error).__mro__ if cls in TABLE), Row(500, SERVER))


def body_of(error: RolloutError, resolved: PolicyVersion | None = None) -> dict[str, Any]:
    """`{"error": …}`, with the policy version the request had resolved to, if any."""
    problem: dict[str, Any] = {
        "message": error.message if len(error.message) <= MESSAGE_LIMIT else error.message[:MESSAGE_LIMIT] + "…",
        "type": row_of(error).type,
        "param": None if error.param is None else shortened(error.param, PARAM_LIMIT),
        "code": error.code,
        "retryable": error.retryable,
    }
    if isinstance(error, errors.AdapterMismatch):
        problem["faults"] = list(error.faults)
    if isinstance(error, errors.PreconditionFailed) and error.at is not None:
        problem |= dict(zip(("policy", "version", "digest"), error.at, strict=True))
    elif resolved is not None:
        problem |= {"policy": resolved.called, "version": resolved.number, "digest": resolved.digest}
    return {"error": problem}


def headers_of(error: RolloutError) -> dict[str, str]:
    """Headers that go with an error."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if isinstance(error, errors.QueueFull):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, errors.Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return headers


def to_response(request: Request[Any, Any, Any], exception: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    error = as_rollout_error(exception)
    headers = headers_of(error)
    if isinstance(error, errors.MethodNotAllowed) and isinstance(exception, litestar_errors.HTTPException):
        allowed = {name.lower(): value for name, value in (exception.headers or {}).items()}.get("allow", "")
        # HEAD is answered wherever GET is.
        headers["allow"] = allowed.replace("GET", "GET, HEAD")
    state = request.scope.setdefault("state", {})
    state[REFUSED] = error.code
    resolved = state.get(RESOLVED)
    return Response(
        content=msgspec.json.encode(body_of(error, resolved)),
        status_code=row_of(error).status,
        headers=headers,
        media_type="application/json",
    )
