"""Which versions of a name are kept, and what is remembered of those that are not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

GONE_DIGESTS = 4096
"""Digests of freed versions that each name remembers; older ones are unknown when asked for by digest."""
GONE_TOLD = 512
"""The newest of them, which outlive the process where there is a state directory."""


def surplus(numbers: Sequence[int], keep: int, live: int | None, held: Collection[int]) -> list[int]:
    """The versions of a name that nothing keeps, oldest first. What stays are the newest `keep`, the live one, and
    those that are `held`: pinned or in use."""
    return [number for number in numbers[:-keep] if number != live and number not in held]


def remember(gone: dict[str, None], digests: Iterable[str]) -> None:
    """Adds digests of freed versions, the newest last, and forgets the oldest beyond `GONE_DIGESTS`."""
    for digest in digests:
        gone.pop(digest, None)
        gone[digest] = None
    while len(gone) > GONE_DIGESTS:
        del gone[next(iter(gone))]
