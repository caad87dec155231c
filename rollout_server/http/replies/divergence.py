"""How far a trainer's log-probabilities are from the server's, in the terms of an importance ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence of N tokens, with d = trainer − server and w = exp d. A value too large for a float is
    infinite."""

    tokens: int
    kl: float
    """mean(exp(d) − 1 − d), nats"""
    mean_ratio: float
    max_ratio: float
    ess: float
    """(Σw)² / (N·Σw²), in (0, 1]"""
    max_abs_difference: float

    @classmethod
    def of(cls, trainer: Sequence[float], server: Sequence[float]) -> Divergence:
        """Computes it in float64 throughout, from at least one token."""
        differences = [ours - theirs for ours, theirs in zip(trainer, server, strict=True)]
        ratios = [_exp(d) for d in differences]
        count, largest = len(differences), max(differences)
        # The share does not change when all weights are divided by the largest, and then nothing overflows.
        weights = [math.exp(d - largest) if math.isfinite(largest) else float(d == largest) for d in differences]
        return cls(
            tokens=count,
            # expm1, because exp(d) − 1 − d of a small d would be rounding.
            kl=math.fsum(_expm1(d) - d if math.isfinite(d) else math.inf for d in differences) / count,
            mean_ratio=math.fsum(ratios) / count,
            max_ratio=max(ratios),
            ess=math.fsum(weights) ** 2 / (count * math.fsum(weight * weight for weight in weights)),
            max_abs_difference=max(map(abs, differences)),
        )


LARGEST = 709.0
"""exp of what is above does not fit into a float."""


def _exp(value: float) -> float:
    return math.exp(value) if value < LARGEST else math.inf


def _expm1(value: float) -> float:
    return math.expm1(value) if value < LARGEST else math.inf
