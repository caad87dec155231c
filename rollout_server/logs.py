"""Logging: standard library, one line a record, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal, TextIO

UVICORN = "uvicorn"
CONFIGURED = ("rollout_server", "adapters", UVICORN)
"""Every logger of the server is a child of one of these."""


class TextLines(logging.Formatter):
    """The time, the level, the message on one line; an exception follows on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message"}`, with `exception` where there is one, and what `extra={"fields": {…}}`
    carries beside them."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure(
    style: Literal["text", "json"] = "text", *, level: int = logging.INFO, stream: TextIO | None = None
) -> None:
    """Sends the server's and uvicorn's records to `stream` (stderr). Other loggers are left as they are."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if style == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(TextLines())
    for name in CONFIGURED:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(max(level, logging.WARNING) if name == UVICORN else level)
        logger.propagate = False
