"""What crosses the border of the engine thread about KV that is kept for later requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Forget the KV that is kept for later requests."""

    id: str


@dataclass(frozen=True, slots=True)
class PrefixCacheReset:
    id: str
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class PrefixStatus:
    """KV kept for later requests. `on` is False where it is switched off or the model's state cannot be cut."""

    on: bool = False
    hits: int = 0
    """Prompts of which something was there,"""
    misses: int = 0
    """and those of which nothing was."""
    hit_tokens: int = 0
    nbytes: int = 0
    evictions: int = 0
