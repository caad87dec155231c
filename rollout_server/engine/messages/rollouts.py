"""Sampling, across the border: what is submitted and what comes back; and the unions of all commands and events."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.engine.messages.control import (
    Abort,
    Leave,
    Leaving,
    LookAtRows,
    Pause,
    Paused,
    Ping,
    Pong,
    PrefixCacheReset,
    Release,
    Released,
    ResetPrefixCache,
    Resume,
    RowsSeen,
    Stop,
)
from rollout_server.engine.messages.scoring import (
    Classified,
    Embedded,
    HoldScorer,
    LetScorerGo,
    Replayed,
    Scored,
    ScorerHeld,
    ScoringCommand,
)
from rollout_server.engine.messages.versions import PolicyCommand, PolicyReply
from rollout_server.errors import RolloutError
from rollout_server.rollout import PolicyVersion, Rollout, RolloutRequest


@dataclass(frozen=True, slots=True)
class Submit:
    """Groups of one HTTP request; accepted or refused together."""

    id: str
    groups: tuple[RolloutRequest, ...]
    deadline: float | None = None
    """time.monotonic() at which what is left ends as `aborted` with stop_reason `timeout`."""
    begins_on: int | None = None
    """The version that groups begin on which are drawn again; None for what their policy names at their turn."""


Command = (
    Submit
    | ScoringCommand
    | HoldScorer
    | LetScorerGo
    | PolicyCommand
    | Abort
    | Pause
    | Resume
    | Release
    | ResetPrefixCache
    | Leave
    | Ping
    | LookAtRows
    | Stop
)


@dataclass(frozen=True, slots=True)
class TokensSampled:
    """New tokens of one row (only for requests that stream tokens)."""

    id: str
    prompt_index: int
    sample_index: int
    version: PolicyVersion
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class RowFinished:
    """One row is done, whatever its finish_reason."""

    id: str
    rollout: Rollout


@dataclass(frozen=True, slots=True)
class Admitted:
    """A group left the queue on this version (only where `EngineOptions.tell_admissions`)."""

    id: str
    prompt_index: int
    version: PolicyVersion


@dataclass(frozen=True, slots=True)
class AwaitsVersion:
    """A group whose turn has come begins to wait for a version, for its `wait_s` (only where
    `EngineOptions.tell_admissions`)."""

    id: str
    prompt_index: int


@dataclass(frozen=True, slots=True)
class RequestDone:
    """Terminal: every row of the request was reported."""

    id: str


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """Terminal: the request ends with an error; rows reported before it stand."""

    id: str
    error: RolloutError


Event = (
    TokensSampled
    | RowFinished
    | Admitted
    | AwaitsVersion
    | RequestDone
    | RequestFailed
    | Scored
    | Replayed
    | Embedded
    | Classified
    | ScorerHeld
    | PolicyReply
    | Paused
    | Released
    | PrefixCacheReset
    | Leaving
    | Pong
    | RowsSeen
)
