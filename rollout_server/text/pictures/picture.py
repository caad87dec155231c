"""A picture as the engine is given it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Picture:
    """What the model's image processor made of one picture."""

    digest: str
    """`sha256:` and 64 hex digits, of the pixels, their shape and the grid: two pictures of one size differ in it."""
    pixels: bytes = field(repr=False)
    """Little-endian float32 in the order of `shape`."""
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    """How it is cut, see `models.vision.family.Grid`."""
    tokens: int
    """How many placeholders stand for it."""
