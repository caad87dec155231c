"""PEFT's rule for `rank_pattern` and `alpha_pattern`: which of many patterns is a layer's.

The server decides by the same table, in `adapters/formats/bounded_regex.py`; the client must not need the server
installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

PLAIN = re.compile(r"(\^?)((?:[^\\^$|?*+()\[\]{}\n]|\\[^0-9A-Za-z\s])*)\$?")
"""A name, with or without anchors and escapes: no operator but the dot."""
UNESCAPED = re.compile(r"\\(.)|\.")
ANY = "\n"
"""Stands in place of a dot that means any character; no layer's name has it."""
MAX_SHAPES = 256
"""The most shapes of plain patterns, by length and place of the dots: each costs a look-up."""

T = TypeVar("T")


class PatternTable(Generic[T]):
    r"""Values by pattern of a layer's name, as `rank_pattern` and `alpha_pattern` are: PEFT takes the first, in the
    file's order, with `re.match(rf"(.*\.)?({pattern})$", name)`.

    Plain patterns are found by the ends of a name. In an expression an unescaped dot stands for any character, and so
    it does here: `layers.1.mlp` is also the end of `layers_1_mlp`."""

    def __init__(self, table: Mapping[str, T]) -> None:
        self._table = table
        self._plain: dict[tuple[str, bool], int] = {}
        """(text with `ANY` for its dots, whether it must be the whole name) → place in the file."""
        self._shapes: dict[int, list[tuple[slice, ...]]] = {}
        """Length of a plain pattern → what lies between its dots, for each way in which patterns have them."""
        self._expressions: list[int] = []
        self._keys = tuple(table)
        known: set[tuple[int, ...]] = set()
        for place, pattern in enumerate(self._keys):
            text, whole = _plain(pattern)
            dots = tuple(at for at, character in enumerate(text or "") if character == ANY)
            shape = (len(text or ""), *dots)
            if text is None or (len(known) == MAX_SHAPES and shape not in known):
                self._expressions.append(place)
                continue
            if shape not in known:
                known.add(shape)
                between = zip((-1, *dots), (*dots, len(text)), strict=True)
                self._shapes.setdefault(len(text), []).append(tuple(slice(a + 1, b) for a, b in between))
            self._plain.setdefault((text, whole), place)

    def first(self, name: str, default: T) -> T:
        """The value of the first pattern that matches, else of `name` itself, else `default`. Raises `re.error`."""
        place = min(self._found(name), default=len(self._keys))
        for other in self._expressions:
            if other > place:
                break
            if re.match(rf"(.*\.)?({self._keys[other]})$", name):
                place = other
                break
        return self._table[self._keys[place]] if place < len(self._keys) else self._table.get(name, default)

    def _found(self, name: str) -> Iterator[int]:
        for end in _ends(name):
            for shape in self._shapes.get(len(end), ()):
                text = ANY.join([end[part] for part in shape])
                for whole in (False, True) if len(end) == len(name) else (False,):
                    if (text, whole) in self._plain:
                        yield self._plain[text, whole]


def _ends(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c`: what a pattern may match of a name."""
    yield name
    yield from (name[dot.end() :] for dot in re.finditer(r"\.", name))


def _plain(pattern: str) -> tuple[str | None, bool]:
    """(What a plain pattern says with `ANY` for its dots, whether it must be the whole name); (None, …) for others."""
    match = PLAIN.fullmatch(pattern)
    if match is None:
        return None, False
    return UNESCAPED.sub(lambda found: found[1] or ANY, match[2]), bool(match[1])
