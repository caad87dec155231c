"""Messages about memory: what it is made of, and giving it back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Release:
    """Give back memory that is not in use: free KV and what MLX keeps of freed arrays."""

    id: str


@dataclass(frozen=True, slots=True)
class Released:
    id: str
    nbytes: int
    """What the process holds less than before,"""
    kv_bytes: int
    """and how much of it was KV."""


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """Bytes of device memory by what they are for. What a forward computes with (activations, logits) is in `active`
    alone."""

    weights: int = 0
    """The base."""
    kv_limit: int = 0
    kv_held: int = 0
    """Allocated for rows,"""
    kv_filled: int = 0
    """and what they have filled of it."""
    kv_kept: int = 0
    """For later requests that begin with the same tokens,"""
    kv_prompts: int = 0
    """for samples that wait for a place in models whose state cannot be cut,"""
    kv_scored: int = 0
    """and of what is being scored or embedded."""
    slots: int = 0
    """Of adapters, free ones included."""
    sets: int = 0
    """Parameter sets beside the base."""
    active: int = 0
    """All arrays of this process, as MLX counts them,"""
    cached: int = 0
    """what MLX keeps of freed ones,"""
    peak: int = 0
    """and the most that were active at once since the start."""
