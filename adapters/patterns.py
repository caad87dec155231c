"""Regular expressions sent by a stranger, as PEFT configurations hold them, within bounds of length and time.

The expressions are those of Python's `re`; they run on the `regex` package because it can stop after a time, so that
no expression can hold the server.
"""

from __future__ import annotations

import re
import time

import regex

from adapters.spec import AdapterUnreadable, shown

MAX_LENGTH = 4096
MAX_REPEAT = 64
"""Largest product of all counted repeats of one expression: `regex` unrolls them when it compiles."""
SECONDS_EACH = 0.1
"""Of processor time, for one match; an honest one on a module path takes microseconds."""
SECONDS_TOGETHER = 1.0
COUNTED = re.compile(r"\{(\d{0,4})(?:,(\d{0,4}))?\}")

WIDE = re.compile(r"-(?:[^\x00-\xff]|\\[uU])")
"""The end of a range of thousands of characters: `re` goes through them one by one, for seconds."""


class Patterns:
    """Compiles and matches the expressions of one configuration; all of them together have `SECONDS_TOGETHER`."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As `re.fullmatch`. Raises `AdapterUnreadable` for an expression that is broken or takes too long."""
        return self._run(pattern, text, whole=True)

    def match(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As `re.match`, with the same errors."""
        return self._run(pattern, text, whole=False)

    def _run(self, pattern: str, text: str, *, whole: bool) -> regex.Match[str] | None:
        began = time.perf_counter()
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = _compile(pattern)
        method = compiled.fullmatch if whole else compiled.match
        try:
            # Giving the GIL up for microseconds would cost milliseconds each time while the engine is busy.
            found = method(text, timeout=SECONDS_EACH, concurrent=False)
        except (TimeoutError, MemoryError) as error:
            raise _too_slow(pattern) from error
        self._spent += time.perf_counter() - began
        if self._spent > SECONDS_TOGETHER:
            raise _too_slow(pattern)
        return found


def _too_slow(pattern: str) -> AdapterUnreadable:
    return AdapterUnreadable(
        f"The regular expressions of the adapter configuration take too long; the last one was {shown(pattern)!r}. "
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
            f"The regular expression {shown(pattern)!r} of the adapter configuration repeats too much, uses braces for "
            "something else than a count, or has ranges beyond Latin letters. List the target modules by name instead."
        )
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise AdapterUnreadable(
            f"{shown(pattern)!r} in the adapter configuration is not a regular expression: {shown(error)}."
        ) from error
