"""Spans as they cross: what keeps them from covering each token once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout_server.quoting import counted
from rollout_server.rollout import CARRIED, SpanAddress


class Stretch(Protocol):
    """Whatever covers tokens `start` to `end` (excluded)."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


def gap_fault(spans: Sequence[Stretch], length: int) -> str | None:
    """What keeps spans from covering each of `length` tokens once, in order; None if nothing."""
    at = 0
    for index, span in enumerate(spans):
        if span.start != at or span.end <= span.start:
            return f"span {index} covers {span.start} to {span.end}, where one that starts at {at} is needed"
        at = span.end
    if at != length:
        return f"the spans end at {at}, but {counted(length, 'token')} are to be covered"
    return None


def tiling_fault(spans: Sequence[SpanAddress], length: int) -> str | None:
    """What keeps spans from saying, for each of `length` tokens, under what it is to be read; None if nothing."""
    if fault := gap_fault(spans, length):
        return fault
    if spans and spans[0].kv == CARRIED:
        return "span 0 carries KV on, but nothing says under what that was read; let a span of that version stand first"
    return None
