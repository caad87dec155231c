"""What the ledger knows of replicas and of work, and what it asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from rollout_server.fleet.ledger.prefixes import KnownPrefixes

Version = tuple[str, int]
"""A policy's name and the number of a version."""
Phase = Literal["stage", "flip"]


class ReplicaState(StrEnum):
    JOINING = "joining"
    """It loads its model."""
    RESTORING = "restoring"
    """It is brought to the versions that the fleet has; it gets no rows yet."""
    LIVE = "live"
    DRAINING = "draining"
    """It finishes what it has and gets no more."""
    FENCED = "fenced"
    """It was late with a change or silent: what it had admitted may finish, and it gets no rows until it is even."""
    DEAD = "dead"


SERVING = (ReplicaState.LIVE, ReplicaState.DRAINING, ReplicaState.FENCED)
"""States in which rows may run there."""
KEPT_EVEN = (ReplicaState.RESTORING, *SERVING)
"""States in which it is told of every change of versions."""


@dataclass(slots=True, eq=False)
class Replica:
    """One engine, wherever it runs. `room` is how many rows it is given at once."""

    id: str
    room: int
    state: ReplicaState = ReplicaState.JOINING
    heard_at: float = 0.0
    """When its engine's thread was last heard of, on the ledger's clock."""
    told: set[Version] = field(default_factory=set)
    """Versions that it was sent."""
    held: set[Version] = field(default_factory=set)
    """Those of them that it said it has staged."""
    told_live: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    """Where its aliases are, as far as it said so."""
    moves: Counter[str] = field(default_factory=Counter)
    """How often it was told to move an alias and has not answered: it may be told to go there and back."""
    attempts: dict[int, Attempt] = field(default_factory=dict)
    prefixes: KnownPrefixes = field(default_factory=KnownPrefixes)
    readings: set[str] = field(default_factory=set)
    """What it reads, by the ids of the commands."""
    leaves: bool = False
    """It was told to go, so that its end is nobody's fault."""
    rows: int = 0
    """Rows that it was given and has not reported; those that only wait for a version are not counted."""


@dataclass(slots=True, eq=False)
class Work:
    """One group: `samples` rows of one prompt. It is placed as a whole."""

    key: Hashable
    name: str
    """The policy's."""
    prompt: tuple[int, ...]
    samples: int
    number: int | None = None
    """The version that its address names; None where it follows the name."""
    waits: bool = False
    """It may wait for a version to be pushed, so that it holds up nobody meanwhile."""
    switches: bool = False
    """Its rows go over to newer versions as they run, so that they cannot be drawn again from a seed."""
    missing: set[int] = field(default_factory=set)
    """Samples that were not delivered yet."""
    admitted: Version | None = None
    """What it began on; lost samples are drawn again under it."""
    attempt: Attempt | None = None
    deaths: int = 0
    """Replicas that ended while they had it."""
    shown: dict[int, set[int]] = field(default_factory=dict)
    """Samples whose tokens were handed on before they ended, with the numbers of the versions that those are of."""

    def __post_init__(self) -> None:
        self.missing = set(range(self.samples))

    @property
    def counted(self) -> int:
        """How many rows it takes: those that are missing, unless it only waits."""
        return 0 if self.waits and self.admitted is None else len(self.missing)


@dataclass(slots=True, eq=False)
class Attempt:
    """Some samples of a group at one replica. Only the newest attempt of a group is listened to."""

    number: int
    replica: str
    work: Work
    samples: tuple[int, ...]
    pinned: Version | None
    admitted: bool = False
    counted: int = 0
    """Rows of it that its replica's count has."""

    @property
    def missing(self) -> set[int]:
        return self.work.missing.intersection(self.samples)


@dataclass(slots=True, eq=False)
class Change:
    """A phase of a change of versions, until every live replica has done it or is fenced."""

    number: int
    phase: Phase
    version: Version
    began: float
    seconds: float
    """How long it may take."""
    waiting: set[str]

    @property
    def deadline(self) -> float:
        return self.began + self.seconds


# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send these samples of a group to a replica."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Cancel:
    """What this attempt still runs is no longer wanted."""

    replica: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Send a version, to be there and used by nobody yet."""

    replica: str
    version: Version


@dataclass(frozen=True, slots=True)
class Flip:
    """Move an alias to a version that was sent before."""

    replica: str
    version: Version


@dataclass(frozen=True, slots=True)
class Drop:
    """Free a version."""

    replica: str
    version: Version


@dataclass(frozen=True, slots=True)
class End:
    """End the replica's process, and start another in its place unless it was `drained`. One that joined comes back as
    it is unless it is to be started `anew`."""

    replica: str
    reason: str
    drained: bool = False
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Lose:
    """These samples cannot be had: replicas ended under them once too often, or they cannot be drawn again. None are
    named of a group whose rows have all come, and whose replica ended before it had said so."""

    work: Work
    samples: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Settle:
    """A phase of a change is done on every replica that is not fenced."""

    change: int


Action = Dispatch | Cancel | Stage | Flip | Drop | End | Lose | Settle
