"""The server itself: what it serves, whether it lives, and pausing it."""

from __future__ import annotations

from trainer_client.call import Call
from trainer_client.parsing import (
    parse_models,
)
from trainer_client.versions import ServedModel

PROBE_S = 5.0
"""Seconds to wait for the answer of a health check."""


def models() -> Call[tuple[ServedModel, ...]]:
    """What can be asked for: the base, names, and kept versions, with context length, vocabulary and digest."""
    return Call(method="GET", path="/v1/models", parse=parse_models, idempotent=True)


def health() -> Call[bool]:
    """Whether the server's engine lives and answers. Asked once; raises `ServerUnreachable` if nobody answers."""
    return _yes_or_no("/health")


def ready() -> Call[bool]:
    """Whether the server has its model and can sample. Asked once; raises `ServerUnreachable` if nobody answers."""
    return _yes_or_no("/ready")


def _yes_or_no(path: str) -> Call[bool]:
    return Call(method="GET", path=path, parse=lambda reply: reply.status < 400, accepts=(503,), timeout_s=PROBE_S)
