"""What a controller and a replica say to each other: the engine's own messages, and what they need besides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from adapters.bundle import AdapterBundle
from adapters.spec import Mode
from rollout_server.engine.messages.control import (
    Abort,
    LookAtRows,
    Pause,
    Ping,
    Release,
    ResetPrefixCache,
    Resume,
    Stop,
)
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import Event, Submit
from rollout_server.engine.messages.scoring import Classify, Embed, HoldScorer, LetScorerGo, Replay, Score
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.errors import RolloutError
from rollout_server.fleet.codec.frames import Codec
from rollout_server.fleet.codec.values import Compile, Described


@dataclass(frozen=True, slots=True)
class Hello:
    """The first word of a controller: how the engine is to be started."""

    options: EngineOptions
    cores: int
    """One part in so many of the machine's cores is the replica's."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    model: Described
    pid: int
    libraries: dict[str, str]
    """Versions of what decides the numbers, by name."""


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The first and last word of a replica that could not load the model."""

    error: RolloutError


@dataclass(frozen=True, slots=True)
class StageVersion:
    """Make a version ready, to be used by nobody yet. Answered with `Published`, or `RequestFailed`."""

    id: str
    name: str
    number: int
    bundle: AdapterBundle
    label: str | None
    mode: Mode
    dequantize: bool


@dataclass(frozen=True, slots=True)
class FlipAlias:
    """Move a name to a version that was staged before. Answered with `Published`."""

    id: str
    name: str
    number: int
    label: str | None


@dataclass(frozen=True, slots=True)
class DropVersion:
    """Free a version, or with `number` None all of a name. What it is answered with says nothing new."""

    id: str
    name: str
    number: int | None


VERSIONS = StageVersion | FlipAlias | DropVersion
COMMANDS = (
    Hello, StageVersion, FlipAlias, DropVersion, Submit, Score, Replay, Embed, Classify, HoldScorer, LetScorerGo, Abort,
    Pause, Resume, Release, ResetPrefixCache, Ping, LookAtRows, Stop,
)  # fmt: skip
"""What a controller says. Deadlines are seconds from now: clocks of two machines have nothing in common."""
ANSWERS = (Ready, CannotStart, EngineStatus, *get_args(Event))
"""What a replica says."""


def as_replica(options: EngineOptions) -> EngineOptions:
    """The options of an engine of a fleet: its versions are freed by command, it says when it admits, and how much may
    wait is the controller's to say."""
    return replace(options, keep_versions=None, tell_admissions=True, max_queue=2**31)


def link_codec(compile: Compile) -> Codec:
    """The codec of both sides; `compile` makes grammars ready."""
    return Codec((*COMMANDS, *ANSWERS), compile)
