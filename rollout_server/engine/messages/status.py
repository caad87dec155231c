"""The engine's status: one immutable snapshot, which its thread replaces after every change."""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout_server.engine.messages.control import (
    PauseMode,
)
from rollout_server.engine.messages.versions import PolicyStatus


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """Bytes of device memory by what they are for. What a forward computes with (activations, logits) is in `active`
    alone."""

    weights: int = 0
    """The base."""
    kv_limit: int = 0
    kv_held: int = 0
    """KV that is allocated for rows."""
    kv_filled: int = 0
    """How much of it rows have filled."""
    kv_kept: int = 0
    """KV in the prefix cache, for later requests that begin with the same tokens."""
    kv_prompts: int = 0
    """KV of prompts that are kept for samples that wait, in models whose state cannot be cut."""
    kv_scored: int = 0
    """KV of what is being scored or embedded."""
    kv_pictures: int = 0
    """What the tower made of pictures, kept for whoever shows one of them again."""
    slots: int = 0
    """Slots of adapters, free ones included."""
    sets: int = 0
    """Parameter sets beside the base."""
    active: int = 0
    """All arrays of this process, as MLX counts them."""
    cached: int = 0
    """What MLX keeps of freed arrays."""
    peak: int = 0
    """The most that was active at once since the start."""


@dataclass(frozen=True, slots=True)
class PrefixStatus:
    """KV kept for later requests. `on` is False where it is switched off or the model's state cannot be kept."""

    on: bool = False
    hits: int = 0
    """Prompts of which the cache held something."""
    misses: int = 0
    """Prompts of which it held nothing."""
    hit_tokens: int = 0
    nbytes: int = 0
    evictions: int = 0
    asked_tokens: int = 0
    """Tokens of all prompts that were looked up."""


@dataclass(frozen=True, slots=True)
class PictureStatus:
    """Pictures that a tower has read. All 0 for a model that sees none."""

    kept: int = 0
    """Pictures whose features are cached; their bytes are `MemoryStatus.kv_pictures`."""
    read: int = 0
    """Pictures that the tower has read, repeats included."""
    hits: int = 0
    """Pictures whose features were in the cache."""


GAP_BOUNDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds up to which gaps between tokens are counted together."""


@dataclass(frozen=True, slots=True)
class TokenGaps:
    """Times from one token of a row to its next."""

    counts: tuple[int, ...] = (0,) * (len(GAP_BOUNDS) + 1)
    """How many were at most as long as each bound and longer than the one before; at last those above all bounds."""
    seconds: float = 0.0
    """All of them together."""

    def __add__(self, other: TokenGaps) -> TokenGaps:
        counts = (own + more for own, more in zip(self.counts, other.counts, strict=True))
        return TokenGaps(tuple(counts), self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One engine of a fleet."""

    id: str
    state: str
    """`joining`, `restoring`, `live`, `draining`, `fenced` or `dead`."""
    device: str | None
    """None until it is known."""
    pid: int | None
    """The process's id, where it is one of this machine's."""
    rows: int
    """Rows that it was given and has not reported."""
    versions_staged: int
    last_seen_s: float
    """Seconds since its engine's thread was heard of."""
    running: int = 0
    """Rows in its batch."""
    tokens: int = 0
    """Sampled since it started."""
    restarts: int = 0
    """How often it was started again."""
    held: frozenset[tuple[str, int]] = frozenset()
    """Names and numbers of the versions that it has staged."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """`state` is starting, ready, stopping or dead; `fault` says why it died."""

    state: str
    fault: str | None = None
    waiting: int = 0
    """Requests in the queue."""
    waiting_rows: int = 0
    """Samples in the queue, whatever request they are of."""
    running: int = 0
    """Rows in the batch."""
    preempted: int = 0
    """Rows that were preempted: they gave their KV up and wait to be recomputed."""
    preemptions: int = 0
    """How often a row was preempted since the start."""
    policies: tuple[PolicyStatus, ...] = field(default=())
    steps: int = 0
    tokens: int = 0
    """Sampled since the start."""
    gaps: TokenGaps = field(default_factory=TokenGaps)
    """Between the tokens of rows, since the start."""
    slot_bytes: int = 0
    """Device memory of all adapter slots, free ones included."""
    set_bytes: int = 0
    """Device memory of all parameter sets, the base not counted."""
    sets: int = 0
    """How many parameter sets there are, the base not counted."""
    prefix: PrefixStatus = field(default_factory=PrefixStatus)
    paused: PauseMode | None = None
    """How new work is held: `wait`, `keep` or `abort`; None if it is not."""
    memory: MemoryStatus = field(default_factory=MemoryStatus)
    pictures: PictureStatus = field(default_factory=PictureStatus)
    replicas: tuple[ReplicaStatus, ...] = ()
    """The engines of a fleet; empty where one engine runs in this process."""
    fewest: int = 0
    """So many of them have to be live for the fleet to be ready."""
