"""Memory of the host for many megabytes at once: a fresh page costs more than the number that is written into it.

numpy's own arrays come in large pages where the system has some, which `bytes` do not; and a temporary array that is
used again needs no fresh page at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

PIECE = 1 << 16
"""Values that are worked on at a time where several passes are needed: they stay in a processor's cache."""


def joined(pieces: Sequence[bytes | bytearray | memoryview]) -> memoryview:
    """All bytes in one, read-only. Copying them keeps Python from no other thread."""
    if not pieces:
        return memoryview(b"")
    whole = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])
    return whole.data.toreadonly()


def in_pieces(rows: NDArray[Any]) -> Iterator[slice]:
    """Slices of the first dimension with about `PIECE` values each."""
    each = max(1, PIECE // max(1, math.prod(rows.shape[1:])))
    return (slice(begin, begin + each) for begin in range(0, len(rows), each))


class Scratch:
    """Arrays for what is not kept, for one thread. What is asked for holds until the same name is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}
        self._shaped: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}
        """Layers have few shapes, and a look-up costs less than another view."""

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """[shape] of any values. A name has one dtype."""
        found = self._shaped.get((name, shape))
        return self._made(name, shape, dtype) if found is None else found

    def _made(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype)
            self._shaped = {key: view for key, view in self._shaped.items() if key[0] != name}
        made = self._shaped[name, shape] = held[:size].reshape(shape)
        return made


class Results:
    """Arrays for what is kept, cut one after another out of one piece of memory."""

    def __init__(self, size: int, dtype: DTypeLike) -> None:
        self._left = np.empty(size, dtype)

    def array(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """[shape] of any values; all arrays together have at most `size`."""
        size = math.prod(shape)
        taken, self._left = self._left[:size], self._left[size:]
        return taken.reshape(shape)
