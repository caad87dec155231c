"""What crosses the border of the engine thread to pause it; see `messages.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PauseMode = Literal["wait", "keep", "abort"]


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
