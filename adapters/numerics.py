"""Numbers of an adapter, as pure functions of host arrays, computed in float64, and the memory for many of them.

A fresh page of the host costs more than the number that is written into it. numpy's own arrays come in large pages
where the system has some, which `bytes` do not; and a temporary array that is used again needs no fresh page at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

CANCELLED = 1e-3
"""A sum that is this much smaller than its terms has lost three of the seven digits they have."""
ROUNDING = 1e-5
"""A share of ‖W‖: magnitudes that a trainer computed in float32 differ by less from ours."""
PIECE = 1 << 16
"""Values that are worked on at a time where several passes are needed: they stay in a processor's cache."""


@dataclass(frozen=True, slots=True)
class DeltaMeasure:
    """Measures of one layer's delta, scale · B · A."""

    norm: float
    """Frobenius."""
    largest: float
    """The largest magnitude in A and in scale · B, or in a dense delta; a narrow dtype must be able to hold it."""
    zero: bool
    """Exactly zero because a factor is, as B is before the first step of training."""


class Grams(NamedTuple):
    """A · Aᵀ and Bᵀ · B, [rank, rank] or [experts, rank, rank] with a rank of at most min(out, in): all that the norm
    and the singular values of B · A depend on."""

    a: NDArray[np.float64]
    b: NDArray[np.float64]

    @classmethod
    def of(cls, a: NDArray[np.float32], b: NDArray[np.float32], scratch: Scratch) -> Grams:
        """Grams of A [rank, in] and B [out, rank], or of stacks of them [experts, …]."""
        wide_a, wide_b = scratch.array("a", a.shape, np.float64), scratch.array("b", b.shape, np.float64)
        np.copyto(wide_a, a)
        np.copyto(wide_b, b)
        thin_a, thin_b = thinned(wide_a, wide_b)
        return cls(thin_a @ thin_a.mT, thin_b.mT @ thin_b)

    def norm(self, scale: float) -> float:
        """‖scale · B · A‖ (Frobenius), without forming the product: ‖BA‖² = tr(BᵀB · AAᵀ)."""
        squared = float((self.b * self.a).sum())
        return abs(scale) * math.sqrt(max(squared, 0.0))


def measure(a: NDArray[np.float32], b: NDArray[np.float32], scale: float, grams: Grams) -> DeltaMeasure:
    """Measures the delta of A [rank, in] and B [out, rank], or of stacks of them [experts, …]."""
    largest_a, largest_b = largest(a), largest(b) * abs(scale)
    return DeltaMeasure(
        norm=grams.norm(scale),
        largest=max(largest_a, largest_b),
        zero=largest_a == 0 or largest_b == 0,
    )


def largest(values: NDArray[np.float32]) -> float:
    """The largest magnitude; 0 of no values. Nothing of the size of `values` is formed."""
    most, least = (float(extreme.reduce(values, axis=None, initial=0.0)) for extreme in (np.maximum, np.minimum))
    return max(most, -least)


def measure_dense(delta: NDArray[np.float32]) -> DeltaMeasure:
    """Measures a whole tensor that is added to the base's."""
    most = largest(delta)
    norm = float(np.sqrt(np.square(delta, dtype=np.float64).sum()))
    return DeltaMeasure(norm=norm, largest=most, zero=most == 0)


def thinned(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A […, rank, in] and B […, out, rank] with the same product and a rank of at most min(out, in): what is computed
    in rank × rank must not be larger than the file that a stranger sent."""
    out, width = b.shape[-2], a.shape[-1]
    if a.shape[-2] <= min(out, width):
        return a, b
    product = b @ a
    whole = np.broadcast_to(np.eye(min(out, width)), (*a.shape[:-2], min(out, width), min(out, width)))
    return (product, whole) if out <= width else (whole, product)


def squared_delta_norms(a: NDArray[Any], b: NDArray[Any], scale: float) -> NDArray[np.float64]:
    """‖scale · B · A‖² of each row [out]: s² · b · (A · Aᵀ) · b for a row b of B; A [rank, in], B [out, rank]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.shape[0] > a.shape[1]:  # Whichever is smaller than what was sent.
        return scale**2 * np.square(b @ a).sum(axis=1)
    return scale**2 * ((b @ (a @ a.T)) * b).sum(axis=1)


def gained_squares(
    gain: NDArray[np.float64], base: NDArray[np.float64], inner: NDArray[np.float64], added: NDArray[np.float64]
) -> NDArray[np.float64]:
    """‖gain · (w + d) − w‖² of each row [out], what DoRA changes in all, from ‖w‖², ⟨w, d⟩ and ‖d‖².

    g(w + d) − w = (g − 1)w + g·d; in this form nothing cancels where g is near 1."""
    return (gain - 1) ** 2 * base + 2 * (gain - 1) * gain * inner + gain**2 * added


def unless_rounding(norm: float, base: float, *, zero: bool) -> float:
    """A change as it is told: 0 where the low-rank part is `zero` and no more than rounding is left of ‖W‖ = `base`."""
    return 0.0 if zero and norm <= ROUNDING * base else norm


def squared_row_norms(
    base: NDArray[np.float64], inner: NDArray[np.float64], added: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """(‖W + scale · B · A‖² of each row [out], rows whose terms cancel so far that this is not accurate).

    ‖w + s·b·A‖² = ‖w‖² + 2s·(w·Aᵀ)·b + s²·b·(A·Aᵀ)·b for a row w of W and b of B: `base`, twice `inner` and `added`,
    the first two exact to float32. Nothing of the size of W is formed.
    """
    squared = base + 2 * inner + added
    return squared, np.flatnonzero(squared < CANCELLED * (base + added))


def joined(pieces: Sequence[bytes | bytearray | memoryview]) -> memoryview:
    """All bytes in one, read-only. Copying them keeps Python from no other thread."""
    if not pieces:
        return memoryview(b"")
    whole = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])
    return whole.data.toreadonly()


def in_pieces(rows: NDArray[Any]) -> Iterator[slice]:
    """Slices of the first dimension with about `PIECE` values each."""
    each = max(1, PIECE // max(1, math.prod(rows.shape[1:])))
    return (slice(begin, begin + each) for begin in range(0, len(rows), each))


class Scratch:
    """Arrays for what is not kept, for one thread. What is asked for holds until the same name is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}
        self._shaped: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}
        """Layers have few shapes, and a look-up costs less than another view."""

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """[shape] of any values. A name has one dtype."""
        found = self._shaped.get((name, shape))
        return self._made(name, shape, dtype) if found is None else found

    def _made(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype)
            self._shaped = {key: view for key, view in self._shaped.items() if key[0] != name}
        made = self._shaped[name, shape] = held[:size].reshape(shape)
        return made


class Results:
    """Arrays for what is kept, cut one after another out of one piece of memory."""

    def __init__(self, size: int, dtype: DTypeLike) -> None:
        self._left = np.empty(size, dtype)

    def array(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """[shape] of any values; all arrays together have at most `size`."""
        size = math.prod(shape)
        taken, self._left = self._left[:size], self._left[size:]
        return taken.reshape(shape)
