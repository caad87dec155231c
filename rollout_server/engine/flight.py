"""What is on its way in a batch: groups whose prompts are being read, and the step that was dispatched last."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rollout_server.engine.cache import Prompt
from rollout_server.engine.penalties import Pairs
from rollout_server.engine.sampling import Sampled
from rollout_server.engine.sequence import Group, TopTokens
from rollout_server.engine.sequence import Sequence as Row
from rollout_server.errors import NonFiniteLogits


@dataclass(frozen=True, slots=True, eq=False)
class Joining:
    """Samples of one group whose prompt is being prefilled."""

    group: Group
    prompt: Prompt
    count: int
    first_sample: int


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A step whose tokens are still to be drawn from its logits [R, V]."""

    number: int
    rows: tuple[tuple[int, Row], ...]
    logits: mx.array
    draws: mx.array
    banned: Pairs | None


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A dispatched step: which row sits where, and its results, still on the device."""

    number: int
    rows: tuple[tuple[int, Row], ...]
    sampled: Sampled

    def land(self) -> Landed:
        """Waits for the results and copies them to the host."""
        sampled = self.sampled
        ids = np.array(sampled.ids).tolist()
        values = np.array(sampled.values).T.tolist()
        top: list[TopTokens] = []
        if sampled.top_ids is not None and sampled.top_logprobs is not None:
            pairs = zip(np.array(sampled.top_ids).tolist(), np.array(sampled.top_logprobs).tolist(), strict=True)
            top = [tuple(zip(tokens, logs, strict=True)) for tokens, logs in pairs]
        return Landed(self.rows, ids, values, top)


@dataclass(frozen=True, slots=True, eq=False)
class Landed:
    """A step's results on the host, by place."""

    rows: tuple[tuple[int, Row], ...]
    ids: list[int]
    values: list[list[float]]
    top: list[TopTokens]

    def record(self, eos: frozenset[int]) -> list[Row]:
        """Gives every row that still runs its token; returns those rows, some of which end with it."""
        touched = []
        for place, row in self.rows:
            # Of a row that ended meanwhile too: whoever gets its place next reads what stands there.
            row.finite = math.isfinite(self.values[place][0]) and math.isfinite(self.values[place][1])
            if not row.running:
                continue
            if row.finite:
                row.record(self.ids[place], self.values[place], self.top[place] if self.top else None, eos)
            else:
                row.fail(
                    NonFiniteLogits(
                        f"The model produced NaN or infinity at token {len(row.token_ids)} of this row under "
                        f"{row.version.name}@{row.version.number}; the other rows are not affected."
                    )
                )
            touched.append(row)
        return touched
