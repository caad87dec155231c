"""What a request is called: by its body, by its header, or by a name made up here."""

from __future__ import annotations

import secrets
from typing import Any

from litestar import Request
from pydantic import TypeAdapter, ValidationError

from rollout_server.errors import InvalidField
from rollout_server.logs import REQUEST_ID
from rollout_server.quoting import quoted
from rollout_server.schemas.fields import ID_RULE, RequestId


def header_id(request: Request[Any, Any, Any]) -> str | None:
    """`X-Request-Id`, if it is there and can be one; proxies pass on an empty one where there is none."""
    header = request.headers.get("x-request-id", "").strip()
    if not header:
        return None
    try:
        TypeAdapter(RequestId).validate_python(header)
    except ValidationError as error:
        raise InvalidField(f"X-Request-Id must be {ID_RULE}.", param="X-Request-Id") from error
    return header


def request_id(given: str | None, request: Request[Any, Any, Any], *, kind: str) -> str:
    """The body's `id`, else `X-Request-Id`, else a fresh one."""
    header = header_id(request)
    if header is not None and given not in (None, header):
        raise InvalidField(f"The body calls the request {quoted(given)} and X-Request-Id {quoted(header)}.", param="id")
    id = given or header or f"{kind}-{secrets.token_hex(12)}"
    request.scope["state"][REQUEST_ID] = id
    return id
