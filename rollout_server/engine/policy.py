"""Which versions are live, staged and used by rows. Applied only between steps, on the engine thread."""

from __future__ import annotations

import time
from collections.abc import Sequence

from adapters.registry import Entry, GoneVersion, Mismatch, Registry, RegistryError, UnknownName, UnknownVersion
from adapters.slots import AdapterSlots
from rollout_server.engine.messages import (
    Activate,
    EngineOptions,
    PolicyStatus,
    Publish,
    Published,
    VersionStatus,
)
from rollout_server.engine.model import ResidentModel
from rollout_server.errors import PreconditionFailed, RolloutError, StalePolicy, UnknownPolicy, VersionGone
from rollout_server.rollout import BASE, PolicyAddress, PolicyVersion
