"""What crosses the border about versions of policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters.bundle import AdapterBundle
from adapters.prepare import PreparedBundle
from adapters.spec import HeadTask, Mode
from rollout_server.engine.timeline import Stage
from rollout_server.rollout import PolicyVersion

# ---- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Publish:
    """Stage a bundle as a new version of `name` and, if `activate`, move the alias to it."""

    id: str
    name: str
    bundle: AdapterBundle
    activate: bool = True
    label: str | None = None
    if_match: str | None = None
    """`7` or `sha256:…`: refuse unless the alias is there."""
    prepared: PreparedBundle | None = None
    """The same bundle, made ready on another thread for this mode, so that staging only copies."""
    mode: Mode | None = None
    """How it is served; None for the usual way of its kind."""
    dequantize: bool = False
    """Quantised layers may be served unpacked."""
    provisional: bool = False
    """Only make the version: move no alias, change no label, free nothing. Published again, the rest is done."""
    before: tuple[Stage, ...] = ()
    """What was done before, for the timeline."""
    number: int | None = None
    """The version's number where somebody else counts; None for the next one of the name. A number that is there
    already is that version, whatever else is live."""


@dataclass(frozen=True, slots=True)
class Activate:
    id: str
    name: str
    number: int
    if_match: str | None = None
    check_only: bool = False
    """Say whether it would be done, and leave the alias where it is."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep a version whatever its age, or no longer."""

    id: str
    name: str
    number: int
    pinned: bool


@dataclass(frozen=True, slots=True)
class Delete:
    """Let a version go, or with `number` None all of a name. Rows that use one run on; it is freed with the last."""

    id: str
    name: str
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """Ask for the bundle of a kept version."""

    id: str
    name: str
    number: int


@dataclass(frozen=True, slots=True)
class RestoredVersion:
    number: int
    bundle: AdapterBundle
    label: str | None
    created: float
    """Unix time, seconds, of the first publish."""
    live: bool
    pinned: bool
    mode: Mode = "adapter"
    prepared: PreparedBundle | None = None
    """As in `Publish`."""


@dataclass(frozen=True, slots=True)
class Restore:
    """Put back a name as an earlier run left it; `versions` are oldest first."""

    id: str
    name: str
    last: int
    """The newest number the name ever had."""
    versions: tuple[RestoredVersion, ...]
    gone: tuple[str, ...] = ()
    """Digests of versions that were freed, oldest first."""


PolicyCommand = Publish | Activate | Pin | Delete | Export | Restore
"""What the versions answer to, with one reply each."""

# ---- replies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """The reply means: every group admitted after it uses this version or a later one."""

    id: str
    version: PolicyVersion
    live: bool
    unchanged: bool
    stage_ms: float
    activate_ms: float
    mode: Mode = "adapter"
    resident_bytes: int = 0
    """Device memory that the version takes: its parameter set and one slot."""
    persist_ms: float | None = None
    """Time on the state directory; the engine knows none."""
    changes: Mapping[str, float] = field(default_factory=dict)
    """‖W' − W‖ of DoRA modules and of tensors in place of the base's, which only staging finds out."""


@dataclass(frozen=True, slots=True)
class Pinned:
    id: str
    status: VersionStatus


@dataclass(frozen=True, slots=True)
class Deleted:
    """Addresses of these versions are refused from now on."""

    id: str
    name: str
    last: int
    """The newest number the name ever had."""
    numbers: tuple[int, ...]
    rows_in_use: int
    """Rows that still run on them; the memory is given back with the last of each."""


@dataclass(frozen=True, slots=True)
class Exported:
    id: str
    version: PolicyVersion
    bundle: AdapterBundle


@dataclass(frozen=True, slots=True)
class Restored:
    id: str
    name: str


PolicyReply = Published | Pinned | Deleted | Exported | Restored

# ---- their part of the status -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VersionStatus:
    version: PolicyVersion
    kind: str
    mode: Mode
    rank: int
    modules: int
    live: bool
    pinned: bool
    rows_in_use: int
    nbytes: int
    """Size of the file's tensors."""
    created: float
    """Unix time, seconds."""
    resident_bytes: int = 0
    """Device memory that the version takes: its parameter set and one slot."""
    task: HeadTask | None = None
    """What its own head scores; None where it has none, and does what the base does."""
    labels: int = 0
    """How many its own head scores."""


@dataclass(frozen=True, slots=True)
class PolicyStatus:
    name: str
    live: PolicyVersion | None
    versions: tuple[VersionStatus, ...]
    """Kept versions, oldest first."""
    last: int
    """The newest number the name ever had."""
    gone: tuple[str, ...] = ()
    """The newest digests of versions that were freed, oldest first."""
