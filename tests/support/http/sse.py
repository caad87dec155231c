"""Server-sent events of a reply, and what they add up to."""

from __future__ import annotations

import json
from typing import Any


def events(response: Any) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def joined_chat(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice of a chat reply that the chunks of a stream add up to, as the reply without a stream has it."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    deltas = [part["delta"] for part in parts]
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    content, reasoning = (
        "".join(delta.get(name) or "" for delta in deltas) for name in ("content", "reasoning_content")
    )
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(len(calls)))
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if not content and (calls or reasoning):
        message["content"] = None
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [{name: call[name] for name in call if name != "index"} for call in calls]
    whole = {name: value for name, value in parts[-1].items() if name != "delta"} | {"message": message}
    if whole["logprobs"] is not None:
        entries = [entry for part in parts for entry in part["logprobs"]["content"]]
        whole["logprobs"] = {"content": entries, "refusal": None}
    if "token_ids" in whole:
        whole["token_ids"] = [id for part in parts for id in part["token_ids"]]
    return whole
