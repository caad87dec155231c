"""Which beginnings of prompts a replica has read lately, so that prompts go where their KV is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK = 32
"""Tokens that are remembered as one."""
MOST_KNOWN = 65_536
"""Blocks remembered of each replica; the oldest are forgotten."""


class KnownPrefixes:
    """Hashes of blocks, each with all that stands before it. A hash that is wrong costs a prefill and no result."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._known: OrderedDict[int, None] = OrderedDict()

    def add(self, blocks: Sequence[int]) -> None:
        """Remembers a prompt that was sent there, as its `hashes`."""
        for block in blocks:
            self._known[block] = None
            self._known.move_to_end(block)
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def length(self, blocks: Sequence[int]) -> int:
        """How many tokens of a prompt, given as its `hashes`, it has read."""
        found = 0
        for block in blocks:
            if block not in self._known:
                break
            found += BLOCK
        return found

    def clear(self) -> None:
        """Forgets all, since the KV is gone."""
        self._known.clear()


def hashes(version: tuple[str, int], prompt: Sequence[int]) -> list[int]:
    """One for each whole block of a prompt under a version."""
    return list(_chained(version, prompt))


def _chained(version: tuple[str, int], prompt: Sequence[int]) -> Iterator[int]:
    before = hash(version)
    for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
        before = hash((before, tuple(prompt[start : start + BLOCK])))
        yield before
