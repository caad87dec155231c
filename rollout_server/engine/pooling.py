"""Hidden states of a sequence, chunk by chunk, to the one vector that stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from rollout_server.engine.messages.options import PoolingKind


@dataclass(slots=True, eq=False)
class Pool:
    """The vector of one sequence of `length` tokens, as far as it has been read."""

    kind: PoolingKind
    length: int
    total: np.ndarray | None = None
    """float64 [width]: sum of the states taken."""

    @property
    def first(self) -> int:
        """The first input whose state counts; all behind it do."""
        return 0 if self.kind == "mean" else self.length - 1

    @property
    def vector(self) -> bytes:
        """Little-endian float32 [width], once everything was read."""
        if self.total is None:
            raise RuntimeError("A sequence is pooled before it was read.")
        return (self.total / (self.length - self.first)).astype("<f4").tobytes()


def pool(hidden: mx.array, parts: Sequence[tuple[Pool, int]], state: Sequence[Any]) -> list[bool]:
    """Adds the states of each part's next n inputs from hidden [B, N, width] (row i is part i, its first n columns) and
    evaluates `state` with them. Says which parts are finite; the others are left as they were."""
    counts = mx.array([count for _, count in parts], dtype=mx.int32)
    own = mx.arange(hidden.shape[1])[None] < counts[:, None]
    # Padding may be anything, NaN too.
    sums = mx.where(own[..., None], hidden.astype(mx.float32), 0.0).sum(axis=1)
    mx.eval(sums, *state)
    finite = []
    for (each, _), found in zip(parts, np.array(sums).astype(np.float64), strict=True):
        finite.append(bool(np.isfinite(found).all()))
        if finite[-1]:
            each.total = found if each.total is None else each.total + found
    return finite
