"""Where a version's weights are: a parameter set, and a slot of the adapters that are stacked over it."""

from __future__ import annotations

from dataclasses import dataclass

BASE_SET = 0
BASE_SLOT = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """What a row's forward uses: a parameter set, and on top of it a slot. The default is the bare base."""

    parameters: int = BASE_SET
    slot: int = BASE_SLOT


BASE_PLACEMENT = Placement()
