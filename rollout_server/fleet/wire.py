"""What a controller and a replica say to each other: the engine's own messages, and what they need besides."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress
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
from rollout_server.grammar import Constraint, Grammar

AGAIN = 75
"""Exit status of a replica whose engine failed: what starts it again (systemd, launchd) does so, and not after 1, with
which a replica ends that cannot be started like this."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The first word of a controller: how the engine is to be started."""

    options: EngineOptions
    cores: int
    """One part in so many of the machine's cores is the replica's."""


@dataclass(frozen=True, slots=True)
class HeldVersion:
    """A version that a replica has staged."""

    name: str
    number: int
    digest: str
    mode: Mode


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    model: Described
    pid: int
    libraries: dict[str, str]
    """Versions of what decides the numbers, by name."""
    held: tuple[HeldVersion, ...] = ()
    """What it has staged in an earlier link."""


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
class AdoptVersion:
    """Keep a version that was staged in an earlier link. Answered with what staging it was answered with."""

    id: str
    name: str
    number: int


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


@dataclass(frozen=True, slots=True)
class Introduce:
    """The first word of a replica that joins. `proof` is empty where there is no key."""

    id: str
    proof: str
    process: str = ""
    """What its process has drawn: two that are called alike, as containers may be, are not taken for one."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The first word of a controller to a replica that joins: it may load its model and say that it is ready."""

    instance: str
    """Whose versions these are: what was staged for another one is let go."""
    proof: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The replica is not taken, and why; a controller's last word."""

    error: RolloutError


@dataclass(frozen=True, slots=True)
class Dismissed:
    """The replica is no longer needed, or with `again` is to be started anew; a controller's last word."""

    reason: str
    again: bool = False


VERSIONS = StageVersion | AdoptVersion | FlipAlias | DropVersion
LIBRARIES = ("mlx", "mlx-lm", "rollout-server")
COMMANDS = (
    Hello, Introduce, Welcome, Refused, Dismissed, StageVersion, AdoptVersion, FlipAlias, DropVersion, Submit, Score,
    Replay, Embed, Classify, HoldScorer, LetScorerGo, Abort, Pause, Resume, Release, ResetPrefixCache, Ping,
    LookAtRows, Stop,
)  # fmt: skip
"""What a controller says. Deadlines are seconds from now: clocks of two machines have nothing in common."""
ANSWERS = (Ready, CannotStart, EngineStatus, *get_args(Event))
"""What a replica says."""


def as_replica(options: EngineOptions) -> EngineOptions:
    """The options of an engine of a fleet: its versions are freed by command, it says when it admits, and how much may
    wait is the controller's to say."""
    return replace(options, keep_versions=None, tell_admissions=True, max_queue=2**31)


def libraries() -> dict[str, str]:
    """Versions of what decides the numbers, as they are installed here."""
    found = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def greeting_codec() -> Codec:
    """The codec of first words: of somebody who has proved nothing yet nothing else is read."""
    return Codec((Introduce, Welcome, Refused), _no_grammar)


def _no_grammar(grammar: Grammar) -> Constraint:
    raise ValueError("A first word holds no grammar.")


def link_codec(compile: Compile) -> Codec:
    """The codec of both sides; `compile` makes grammars ready."""
    return Codec((*COMMANDS, *ANSWERS), compile)
