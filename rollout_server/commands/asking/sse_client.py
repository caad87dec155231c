"""A completion as a stream of server-sent events, read by the client: with its key, its errors, its retries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer_client.wire.call import Body, StreamCall
from trainer_client.wire.replies import error_of, parse_json

DATA = b"data:"
DONE = b"[DONE]"


def completion_stream(fields: Mapping[str, Any], *, chat: bool = False) -> StreamCall[dict[str, Any]]:
    """A request of `/v1/completions`, or with `chat` of `/v1/chat/completions`, whose values are the events. The last
    but one has the finish reason, the last `usage`. Raises what the server reports after the start."""
    asked = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    return StreamCall(
        method="POST",
        path="/v1/chat/completions" if chat else "/v1/completions",
        parse=lambda reply: None,
        headers={"content-type": "application/json"},
        body=Body((json.dumps(asked).encode(),)),
        parse_line=_event,
    )


def _event(line: bytes) -> dict[str, Any] | None:
    data = line.removeprefix(DATA).strip()
    if data == DONE:
        return None
    event = parse_json(data)
    if isinstance(error := event.get("error"), dict):
        raise error_of(error)
    return event
