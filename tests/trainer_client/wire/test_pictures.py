"""Pictures as a trainer has them, on their way."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.pictures.files import drawn, saved
from trainer_client.wire.pictures import data_url, images_of, travelling

CONTENT = saved(drawn(6, 4))


def content_of(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def test_every_kind_of_picture_becomes_a_url(tmp_path: Path) -> None:
    path = tmp_path / "it.png"
    path.write_bytes(CONTENT)
    for picture in (CONTENT, bytearray(CONTENT), path, str(path)):
        assert content_of(data_url(picture)) == CONTENT
    image = Image.open(BytesIO(content_of(data_url(drawn(6, 4)))))
    assert image.tobytes() == drawn(6, 4).tobytes()
    for url in ("data:image/png;base64,AA==", "https://example.com/it.png"):
        assert data_url(url) == url
    with pytest.raises(TypeError, match="path, a data: URL"):
        data_url(5)
    with pytest.raises(FileNotFoundError):
        data_url("nowhere.png")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": CONTENT},
        {"type": "image_url", "image_url": CONTENT},
        {"type": "image_url", "image_url": {"url": CONTENT, "detail": "auto"}},
    ],
)
def test_parts_of_messages_travel_as_openai_has_them(part: dict[str, Any]) -> None:
    text = {"type": "text", "text": "what is it?"}
    prompt = {"messages": [{"role": "system", "content": "see"}, {"role": "user", "content": [part, text]}], "n": 2}
    sent = travelling(prompt)
    picture, rest = sent["messages"][1]["content"]
    assert picture["type"] == "image_url" and content_of(picture["image_url"]["url"]) == CONTENT and rest == text
    assert sent["messages"][0] == prompt["messages"][0] and sent["n"] == 2  # type: ignore[index]
    assert images_of(sent) == (picture["image_url"]["url"],)
    # What was given is left as it was.
    assert prompt["messages"][1]["content"][0] is part  # type: ignore[index]


def test_pictures_beside_ids_and_none_at_all() -> None:
    sent = travelling({"token_ids": [1, 2], "images": [CONTENT, CONTENT]})
    assert images_of(sent) == tuple(sent["images"]) and len(sent["images"]) == 2
    assert images_of(travelling({"token_ids": [1]})) == () == images_of(travelling({"text": "hi"}))
