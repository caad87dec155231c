"""Aborting, pausing, giving memory back, signs of life and a look at the rows, across the border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rollout_server.rollout import PolicyVersion

PauseMode = Literal["wait", "keep", "abort"]
NO_FLEET = "This server computes in its own process: it has no replicas."


@dataclass(frozen=True, slots=True)
class Pause:
    """New work waits. What runs goes on (`wait`), freezes (`keep`), or ends with the requests it is of (`abort`)."""

    id: str
    mode: PauseMode
    drain: bool = False
    """Answer when nothing is computed any more."""


@dataclass(frozen=True, slots=True)
class Resume:
    id: str


@dataclass(frozen=True, slots=True)
class Paused:
    id: str
    mode: PauseMode | None
    """None: it goes on."""


@dataclass(frozen=True, slots=True)
class Abort:
    """Ends every row of the named requests; unknown ids are ignored."""

    ids: tuple[str, ...]
    reason: str = "abort"


@dataclass(frozen=True, slots=True)
class Ping:
    """Answered with a `Pong` between two turns: the thread lives."""

    id: str


@dataclass(frozen=True, slots=True)
class Leave:
    """A replica of a fleet is to go: when it has finished what it has, or `at_once`; with `again` it comes back."""

    id: str
    replica: str
    at_once: bool = False
    again: bool = False


@dataclass(frozen=True, slots=True)
class Leaving:
    """It gets no more rows, and is started again only if that was asked for."""

    id: str
    replica: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread after failing what is left by name."""


@dataclass(frozen=True, slots=True)
class Pong:
    id: str


@dataclass(frozen=True, slots=True)
class LookAtRows:
    """Answered with `RowsSeen` between two turns. Nothing is kept for it, so that it costs nothing when nobody asks."""

    id: str


@dataclass(frozen=True, slots=True)
class RowSeen:
    """A row that was admitted and has not ended."""

    id: str
    """The request's."""
    prompt_index: int
    sample_index: int
    version: PolicyVersion
    """The version that samples its next token."""
    tokens: int
    """Sampled so far."""
    most: int
    """The most tokens that this row may have."""
    preempted: bool


@dataclass(frozen=True, slots=True)
class RowsSeen:
    id: str
    rows: tuple[RowSeen, ...]
    count: int
    """How many there are, those that are not told included."""
    by_version: tuple[tuple[PolicyVersion, int], ...] = ()
    """How many of all of them each version samples."""


@dataclass(frozen=True, slots=True)
class Release:
    """Give back memory that is not in use: free KV and what MLX keeps of freed arrays."""

    id: str


@dataclass(frozen=True, slots=True)
class Released:
    id: str
    nbytes: int
    """How much less the process holds than before."""
    kv_bytes: int
    """How much of that was KV."""


@dataclass(frozen=True, slots=True)
class ResetPrefixCache:
    """Forget the KV that is kept for later requests."""

    id: str


@dataclass(frozen=True, slots=True)
class PrefixCacheReset:
    id: str
    freed_bytes: int


ControlCommand = Pause | Resume | Release | ResetPrefixCache | Leave | Ping | LookAtRows
"""Answered once each."""
