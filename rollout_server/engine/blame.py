"""What a failure in the middle of a turn belongs to. Plain Python; knows neither arrays nor threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Blame:
    """`with blame(what):` around a part of a turn. Parts may lie inside each other: whatever was being done when
    something was raised is to blame for it, the outermost first."""

    def __init__(self) -> None:
        self._stack: list[object] = []

    @contextmanager
    def __call__(self, what: object) -> Iterator[None]:
        depth = len(self._stack)
        self._stack.append(what)
        yield
        # Only where nothing was raised: whoever deals with a failure asks what it belongs to.
        del self._stack[depth:]

    def attempt(self, compute: Callable[[], None]) -> Exception | None:
        """Does what a turn computes, and returns whatever it raised: it fails by name what is to blame."""
        try:
            compute()
        except Exception as error:  # The one place: a thread that ended here would answer nobody.
            return error
        return None

    def __iter__(self) -> Iterator[object]:
        return iter(self._stack)

    def of(self, kind: type[T]) -> list[T]:
        """What of this kind is to blame."""
        return [what for what in self._stack if isinstance(what, kind)]

    def clear(self) -> None:
        """The failure has been dealt with, or was none."""
        self._stack.clear()
