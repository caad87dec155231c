"""Formats untrusted input for error messages and logs: printable, short, on one line."""

from __future__ import annotations

SHOWN = 64
"""The most characters that are shown of any one value."""


def shortened(text: str, limit: int = SHOWN) -> str:
    """At most `limit` characters of `text`; characters that cannot be printed are escaped."""
    head = text[:limit]
    plain = head if head.isprintable() else ascii(head)[1:-1]
    if len(text) <= limit and len(plain) <= limit:
        return plain
    return plain[: limit - 1] + "…"


def quoted(value: object) -> str:
    """A value of JSON as the user wrote it: text in quotes, numbers, true, false, null; else what kind of thing it
    is."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"'{shortened(value)}'"
        case int() if abs(value) >= 10**SHOWN:
            return f"a number of more than {SHOWN} digits"
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
    return type(value).__name__


def counted(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{quoted(number)} {noun}" if number == 1 else f"{quoted(number)} {noun}s"
