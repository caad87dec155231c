"""What is on its way in a batch: groups whose prompts are being read, and the step that was dispatched last."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_server.engine.cache import Prompt
from rollout_server.engine.sampling import Sampled
from rollout_server.engine.sequence import Group
from rollout_server.engine.sequence import Sequence as Row


@dataclass(frozen=True, slots=True, eq=False)
class Joining:
    """Samples of one group whose prompt is being prefilled."""

    group: Group
    prompt: Prompt
    count: int
    first_sample: int


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A dispatched step: which row sits where, and its results, still on the device."""

    number: int
    rows: tuple[tuple[int, Row], ...]
    sampled: Sampled
