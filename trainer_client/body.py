"""A request body that is sent piece by piece from the memory it is already in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CHUNK_BYTES = 1 << 20
"""A socket takes a few hundred kilobytes at a time, and the HTTP library copies the unsent rest each time: handing it
one large buffer would cost time quadratic in its size."""


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """Buffers that follow each other on the wire."""

    parts: tuple[bytes | memoryview, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __bytes__(self) -> bytes:
        return b"".join(self.parts)

    def chunks(self) -> Iterator[memoryview]:
        """Pieces of at most `CHUNK_BYTES`, none of them a copy; can be asked for again when the request is repeated."""
        for part in self.parts:
            view = memoryview(part)
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]
