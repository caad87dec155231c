"""Numbers of an adapter, as pure functions of host arrays in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DeltaMeasure:
    """Of one layer's delta, scale · B · A."""

    norm: float
    """Frobenius."""
    largest: float
    """The largest magnitude in A and in scale · B, which a model in a narrow dtype must be able to hold."""
    zero: bool
    """Exactly zero because a factor is, as B is before the first step of training."""


def measure(a: NDArray[np.float64], b: NDArray[np.float64], scale: float) -> DeltaMeasure:
    """Of A [rank, in] and B [out, rank]."""
    largest_a, largest_b = float(np.abs(a).max()), float(np.abs(b).max()) * abs(scale)
    return DeltaMeasure(
        norm=delta_norm(a, b, scale),
        largest=max(largest_a, largest_b),
        zero=largest_a == 0 or largest_b == 0,
    )


def delta_norm(a: NDArray[np.float64], b: NDArray[np.float64], scale: float) -> float:
    """‖scale · B · A‖ (Frobenius) for A [rank, in] and B [out, rank], without forming the product:
    ‖BA‖² = tr(BᵀB · AAᵀ), the product of two rank × rank matrices."""
    squared = float(np.sum((b.T @ b) * (a @ a.T)))
    return abs(scale) * float(np.sqrt(max(squared, 0.0)))
