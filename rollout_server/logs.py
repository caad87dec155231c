"""Logging: the standard library's loggers, written by structlog, one line a record, as text or as JSON.

A line that is written while a request is answered says which request, policy and version it is about. No token's text
and no key is ever a part of a line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

UVICORN = "uvicorn"
CONFIGURED = ("rollout_server", "adapters", UVICORN)
"""Every logger of the server is a child of one of these."""
EXCHANGE = "exchange"
REQUEST_ID, POLICY, VERSION = "request_id", "policy", "version"
"""Keys of the request's state that its lines say."""


def about(exchange: Mapping[str, Any]) -> None:
    """Lines of this task, and of the threads that it has work done on, are about the request with this state from now
    on; what is put into the state later is said by lines that are written later."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**{EXCHANGE: exchange})


def _known_of_the_exchange(_: Any, __: str, event: EventDict) -> EventDict:
    exchange = event.pop(EXCHANGE, None) or {}
    return {**event, **{key: exchange[key] for key in (REQUEST_ID, POLICY, VERSION) if key in exchange}}


def _with_fields(_: Any, __: str, event: EventDict) -> EventDict:
    """What `extra={"fields": {…}}` of the standard library's call carries."""
    record: logging.LogRecord = event["_record"]
    return {**event, **getattr(record, "fields", {})}


def _printable(_: Any, __: str, event: EventDict) -> EventDict:
    """A line of text is one line, whatever a client sent."""
    text = str(event["event"])
    event["event"] = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return event


def _as_text(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    """The time, the level, the message, what it is about; an exception follows on lines of its own."""
    known = " ".join(f"{key}={event[key]}" for key in (REQUEST_ID, POLICY, VERSION) if key in event)
    line = f"{event['time']} {event['level'].upper():<7} {event['event']}" + (f"  [{known}]" if known else "")
    return f"{line}\n{event['exception']}" if "exception" in event else line


def _formatter(style: Literal["text", "json"]) -> structlog.stdlib.ProcessorFormatter:
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _known_of_the_exchange,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
    ]
    written: list[Processor]
    if style == "json":
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"))
        written = [
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    else:
        shared.append(structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False, key="time"))
        written = [_printable, _as_text]
    before: list[Processor] = [_with_fields, structlog.processors.format_exc_info]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[*before, structlog.stdlib.ProcessorFormatter.remove_processors_meta, *written],
    )


def configure(
    style: Literal["text", "json"] = "text", *, level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Sends the server's and uvicorn's records to `stream` (stderr). Other loggers are left as they are."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_formatter(style))
    for name in CONFIGURED:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(max(level, logging.WARNING) if name == UVICORN else level)
        logger.propagate = False
