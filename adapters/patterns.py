"""Regular expressions sent by a stranger, as PEFT configurations hold them, within bounds of length and time.

The expressions are those of Python's `re`; they run on the `regex` package because it can stop after a time and
lets other threads run meanwhile, so that no expression can hold the server.
"""

from __future__ import annotations

import re
import time

import regex

from adapters.spec import AdapterUnreadable, shown

MAX_LENGTH = 4096
MAX_REPEAT = 64
"""Largest product of all counted repeats of one expression: `regex` unrolls them when it compiles."""
COUNTED = re.compile(r"\{(\d{0,4})(?:,(\d{0,4}))?\}")


class Patterns:
    """Compiles and matches the expressions of one configuration; all of them together may take `seconds`."""

    def __init__(self, seconds: float = 2.0) -> None:
        self._end = time.monotonic() + seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As `re.fullmatch`. Raises `AdapterUnreadable` for an expression that is broken or takes too long."""
        return self._run(pattern, text, whole=True)

    def match(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As `re.match`, with the same errors."""
        return self._run(pattern, text, whole=False)

    def _run(self, pattern: str, text: str, *, whole: bool) -> regex.Match[str] | None:
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = _compile(pattern)
        method = compiled.fullmatch if whole else compiled.match
        try:
            return method(text, timeout=max(self._end - time.monotonic(), 0.001), concurrent=True)
        except (TimeoutError, MemoryError) as error:
            raise AdapterUnreadable(
                f"The regular expressions of the adapter configuration take too long; the last one was "
                f"{shown(pattern)!r}. List the target modules by name instead."
            ) from error


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
    if repeats > MAX_REPEAT or "{" in COUNTED.sub("", pattern):
        raise AdapterUnreadable(
            f"The regular expression {shown(pattern)!r} of the adapter configuration repeats too much or uses braces "
            "for something else than a count. List the target modules by name instead."
        )
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise AdapterUnreadable(
            f"{shown(pattern)!r} in the adapter configuration is not a regular expression: {shown(error)}."
        ) from error
