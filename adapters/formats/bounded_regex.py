"""Regular expressions sent by a stranger, as PEFT configurations hold them, within bounds of length and time.

The expressions are those of Python's `re`; they run on the `regex` package because it can stop after a time, so that
no expression can hold the server. Most are plain names, one for every layer of a model: those are looked up.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import regex

from adapters.errors import AdapterUnreadable, shown
from adapters.spec import ends, quoted

MAX_LENGTH = 4096
MAX_REPEAT = 64
"""Largest product of all counted repeats of one expression: `regex` unrolls them when it compiles."""
SECONDS_EACH = 0.1
"""Processor time for one match; an honest one on a module path takes microseconds."""
SECONDS_TOGETHER = 1.0
"""Processor time of the calling thread for all matches: what the engine computes meanwhile is not the file's fault."""
COUNTED = re.compile(r"\{(\d{0,4})(?:,(\d{0,4}))?\}")

WIDE = re.compile(r"-(?:[^\x00-\xff]|\\[uU])")
"""The end of a range of thousands of characters: `re` goes through them one by one, for seconds."""
PLAIN = re.compile(r"(\^?)((?:[^\\^$|?*+()\[\]{}\n]|\\[^0-9A-Za-z\s])*)\$?")
"""A name, with or without anchors and escapes: no operator but the dot."""
UNESCAPED = re.compile(r"\\(.)|\.")
TAIL = re.compile(r"(?<![\w\\-])[\w-]+(?=\$?\Z)")
"""What a name must end with; of an expression without choices, groups and escapes."""
ANY = "\n"
"""Stands in place of a dot that means any character; no layer's name has it."""
MAX_SHAPES = 256
"""The most shapes of plain patterns, by length and place of the dots: each costs a look-up. A model with a pattern for
every layer has about ten."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Patterns:
    """Compiles and matches the expressions of one configuration; all of them together have `SECONDS_TOGETHER`."""

    _spent: float = 0.0
    _compiled: dict[str, regex.Pattern[str]] = field(default_factory=dict)

    def fullmatch(self, pattern: str, text: str) -> regex.Match[str] | None:
        """Matches as `re.fullmatch` does. Raises `AdapterUnreadable` for an expression that is broken or takes too
        long."""
        return self._run(pattern, text, whole=True)

    def match(self, pattern: str, text: str) -> regex.Match[str] | None:
        """Matches as `re.match` does, with the same errors."""
        return self._run(pattern, text, whole=False)

    def _run(self, pattern: str, text: str, *, whole: bool) -> regex.Match[str] | None:
        began = time.thread_time()
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = _compile(pattern)
        method = compiled.fullmatch if whole else compiled.match
        try:
            # Giving the GIL up for microseconds would cost milliseconds each time while the engine is busy.
            found = method(text, timeout=SECONDS_EACH, concurrent=False)
        except (TimeoutError, MemoryError) as error:
            raise _too_slow(pattern) from error
        self._spent += time.thread_time() - began
        if self._spent > SECONDS_TOGETHER:
            raise _too_slow(pattern)
        return found


class PatternTable(Generic[T]):
    r"""Values by pattern of a layer's name, as `rank_pattern` and `alpha_pattern` are: PEFT takes the first, in the
    file's order, with `re.match(rf"(.*\.)?({pattern})$", name)`.

    Plain patterns are found by the ends of a name. In an expression an unescaped dot stands for any character, and so
    it does here: `layers.1.mlp` is also the end of `layers_1_mlp`."""

    def __init__(self, table: Mapping[str, T], patterns: Patterns) -> None:
        self._table = table
        self._patterns = patterns
        self._plain: dict[tuple[str, bool], int] = {}
        """(text with `ANY` for its dots, whether it must be the whole name) → place in the file."""
        self._shapes: dict[int, list[tuple[slice, ...]]] = {}
        """Length of a plain pattern → what lies between its dots, for each way in which patterns have them."""
        self._expressions: list[tuple[int, str]] = []
        """(Place in the file, what a name must end with)."""
        self._keys = tuple(table)
        known: set[tuple[int, ...]] = set()
        for place, pattern in enumerate(self._keys):
            text, whole = _plain(pattern)
            dots = tuple(at for at, character in enumerate(text or "") if character == ANY)
            shape = (len(text or ""), *dots)
            if text is None or (len(known) == MAX_SHAPES and shape not in known):
                self._expressions.append((place, _tail(pattern)))
                continue
            if shape not in known:
                known.add(shape)
                between = zip((-1, *dots), (*dots, len(text)), strict=True)
                self._shapes.setdefault(len(text), []).append(tuple(slice(a + 1, b) for a, b in between))
            self._plain.setdefault((text, whole), place)

    def first(self, name: str, default: T) -> T:
        """The value of the first pattern that matches, else of `name` itself, else `default`."""
        place = min(self._found(name), default=len(self._keys))
        for other, tail in self._expressions:
            if other > place:
                break
            if name.endswith(tail) and self._patterns.match(rf"(.*\.)?({self._keys[other]})$", name):
                place = other
                break
        return self._table[self._keys[place]] if place < len(self._keys) else self._table.get(name, default)

    def _found(self, name: str) -> Iterator[int]:
        for end in ends(name):
            for shape in self._shapes.get(len(end), ()):
                text = ANY.join([end[part] for part in shape])
                for whole in (False, True) if len(end) == len(name) else (False,):
                    if (text, whole) in self._plain:
                        yield self._plain[text, whole]


def _plain(pattern: str) -> tuple[str | None, bool]:
    """(What a plain pattern says with `ANY` for its dots, whether it must be the whole name); (None, …) for others."""
    match = PLAIN.fullmatch(pattern)
    if match is None:
        return None, False
    return UNESCAPED.sub(lambda found: found[1] or ANY, match[2]), bool(match[1])


def _tail(pattern: str) -> str:
    """Looked at first, where there is an expression for every layer: most names end otherwise."""
    tail = None if re.search(r"[|(\[]", pattern) else TAIL.search(pattern)
    return tail[0] if tail else ""


def _too_slow(pattern: str) -> AdapterUnreadable:
    return AdapterUnreadable(
        f"The regular expressions of the adapter configuration take too long; the last one was {quoted(pattern)}. "
        "List the target modules by name instead."
    )


def _compile(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > MAX_LENGTH:
        raise AdapterUnreadable(
            f"A regular expression of the adapter configuration has {len(pattern)} characters; {MAX_LENGTH} are "
            "allowed. List the target modules by name instead."
        )
    repeats = 1
    for low, high in COUNTED.findall(pattern):
        repeats *= max(int(low or 1), int(high or 1), 1)
    # Any other brace is a literal to `re`, but a fuzzy match to `regex`.
    if repeats > MAX_REPEAT or "{" in COUNTED.sub("", pattern) or WIDE.search(pattern):
        raise AdapterUnreadable(
            f"The regular expression {quoted(pattern)} of the adapter configuration repeats too much, uses braces for "
            "something else than a count, or has ranges beyond Latin letters. List the target modules by name instead."
        )
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise AdapterUnreadable(
            f"{quoted(pattern)} in the adapter configuration is not a regular expression: {shown(error)}."
        ) from error
