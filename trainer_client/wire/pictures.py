"""Pictures as a trainer has them → URLs that travel; and which of them a row saw, so that it can be read again."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer_client.data.batch import RolloutBatch
from trainer_client.data.rollout import Rollout

URLS = ("data:", "http://", "https://")


def data_url(picture: Any) -> str:
    """A URL as it is; of a file (a path), of a file's bytes, or of a PIL image, which travels as PNG, a data: URL."""
    if isinstance(picture, str) and picture.startswith(URLS):
        return picture
    if isinstance(picture, str | os.PathLike):
        content = Path(picture).read_bytes()
    elif isinstance(picture, bytes | bytearray | memoryview):
        content = bytes(picture)
    elif callable(getattr(picture, "save", None)):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        content = buffer.getvalue()
    else:
        raise TypeError(
            f"A picture is a path, a data: URL, the bytes of a file or a PIL image, not {type(picture).__name__}."
        )
    return f"data:application/octet-stream;base64,{base64.b64encode(content).decode()}"


def travelling(prompt: Mapping[str, Any]) -> Mapping[str, Any]:
    """A prompt object whose pictures are URLs: `images` beside ids, and parts of messages, either OpenAI's
    `{"type": "image_url", "image_url": {"url": …}}` or `{"type": "image", "image": …}`, with any kind of picture."""
    if prompt.get("images") is not None:
        prompt = {**prompt, "images": [data_url(picture) for picture in prompt["images"]]}
    if isinstance(prompt.get("messages"), Sequence):
        prompt = {**prompt, "messages": [_message(message) for message in prompt["messages"]]}
    return prompt


def images_of(prompt: Mapping[str, Any]) -> tuple[str, ...]:
    """The URLs of a prompt that travels, in the order of their placeholders."""
    found = [*(prompt.get("images") or ())]
    for message in prompt.get("messages") or ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") == "image_url":
                found.append(part["image_url"]["url"])
    return tuple(found)


def with_images(batch: RolloutBatch, images: Sequence[tuple[str, ...]]) -> RolloutBatch:
    """Rows that know what their prompts showed."""
    if not any(images):
        return batch
    rows = [seen(row, images) for row in batch]
    return RolloutBatch.of(rows, policy=batch.policy, instance=batch.instance, complete=batch.complete)


def seen(row: Rollout, images: Sequence[tuple[str, ...]]) -> Rollout:
    """A row that knows what its prompt showed."""
    return replace(row, images=images[row.prompt_index]) if images[row.prompt_index] else row


def _message(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": [_part(part) for part in content]}


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image" and "image" in part:
        return {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
    if kind == "image_url":
        given = part["image_url"]
        own = dict(given) if isinstance(given, Mapping) else {"url": given}
        return {"type": "image_url", "image_url": own | {"url": data_url(own["url"])}}
    return part
