"""One HTTP reply, read to its end, and what every reply has in common: JSON, required fields, errors.

Unknown fields are ignored, so a newer server can be talked to; a missing required one is a `BadReply` that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from trainer_client.errors import BadReply, ServerError, error_class

T = TypeVar("T")


SHOWN = 200
"""The most bytes of a bad reply that an error message quotes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Header names are looked up in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray = b""
    opened: Any = None
    """For a streamed call, the transport's open response, whose body is still to come."""

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class LineBuffer:
    """Bytes as they arrive → lines of NDJSON. Only a newline byte ends one: JSON text may hold U+2028 and the other
    separators at which Python's and httpx's own line splitting would cut."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def lines(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes, without empty ones."""
        self._pending += chunk
        *complete, rest = self._pending.split(b"\n") if b"\n" in chunk else [self._pending]
        self._pending = bytearray(rest)
        return [bytes(line) for line in complete if line.strip()]

    def unfinished(self) -> str:
        """The sentence for a stream that ended here, before its last line."""
        rest = bytes(self._pending[:SHOWN])
        return f"The stream broke off before its last line; what was left: {rest!r}. Rows already received are whole."


def need(entry: Mapping[str, Any], name: str, kind: type[T], where: str = "reply") -> T:
    """A required field of a JSON object; `BadReply` if it is missing or of another type."""
    value = entry.get(name)
    # bool is a subclass of int in Python, but not in JSON
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = f"is {type(value).__name__}" if name in entry else "is missing"
        raise BadReply(f"The server's {where} is not as the contract says: field {name!r} {found}.")
    return value


def need_objects(entry: Mapping[str, Any], name: str, where: str = "reply") -> list[dict[str, Any]]:
    """A required list of JSON objects."""
    values = need(entry, name, list, where)
    if not all(isinstance(value, dict) for value in values):
        raise BadReply(f"The server's {where} is not as the contract says: {name!r} holds something else than objects.")
    return values


def parse_json(body: bytes | bytearray | str) -> dict[str, Any]:
    """A JSON object; `BadReply` for anything else."""
    try:
        value = json.loads(body)
    except ValueError as error:
        raise BadReply(f"The server's reply is not JSON ({error}): {_shown(body)!r}.") from error
    if not isinstance(value, dict):
        raise BadReply(f"The server's reply is not a JSON object: {_shown(body)!r}.")
    return value


def _shown(body: bytes | bytearray | str) -> bytes | str:
    return body[:SHOWN] if isinstance(body, str) else bytes(body[:SHOWN])


def parse_error(reply: Reply) -> ServerError:
    """The exception of a reply with an error status, whoever wrote it: the server, or a proxy without a JSON body."""
    try:
        error = json.loads(reply.body).get("error")
    except (ValueError, AttributeError):
        error = None
    if not isinstance(error, dict):
        start = reply.body[:SHOWN].decode("utf-8", "replace").strip()
        error = {"message": f"HTTP status {reply.status} without an error body: {start or 'nothing'!r}."}
    should_retry = reply.headers.get("x-should-retry")
    if should_retry is not None:
        error = {**error, "retryable": should_retry.strip().lower() == "true"}
    return error_of(error, status=reply.status, retry_after_s=_retry_after(reply.headers.get("retry-after")))


def error_of(error: Mapping[str, Any], *, status: int = 0, retry_after_s: float | None = None) -> ServerError:
    """The exception of an `error` object: of a body or of the last line of a stream."""
    code = error.get("code")
    code = code if isinstance(code, str) else None
    return error_class(code)(
        str(error.get("message") or f"HTTP status {status}."),
        status=status,
        code=code,
        param=error.get("param"),
        retryable=error.get("retryable") is True,
        faults=tuple(str(fault) for fault in error.get("faults") or ()),
        retry_after_s=retry_after_s,
        policy=error.get("policy"),
        version=error.get("version"),
        digest=error.get("digest"),
    )


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of the header; None for neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
