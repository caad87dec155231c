"""What reads pictures for one model, whatever its family: bytes to pixels, and placeholders in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout_server.text.pictures.picture import Picture


@dataclass(frozen=True, slots=True)
class Measure:
    """How large a picture is."""

    pixels: int
    """Width times height of its file."""
    tokens: int
    """How many placeholders stand for it; 0 where the processor's settings do not say it beforehand."""


class PictureReader(Protocol):
    """On any thread."""

    def read(self, data: bytes, most_pixels: int) -> Picture:
        """The bytes of a file as what the model's own image processor makes of them. Raises `ValueError`, with half a
        sentence for the user, for what is no picture, is broken, or has more pixels than `most_pixels`; the latter
        before it is decoded."""

    def measure(self, data: bytes, most_pixels: int) -> Measure:
        """What can be said of a file before it is decoded. Raises `ValueError`, likewise."""

    def expand(self, text: str, pictures: Sequence[Picture]) -> str:
        """A rendered conversation in which each picture has as many placeholders as the model reads for it. Raises
        `ValueError`, likewise, where the text has another number of places for pictures."""
