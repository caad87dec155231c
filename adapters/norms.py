"""‖W + scale · B · A‖ of every row of a base's layers: what DoRA divides its magnitudes by.

Row norms of W are computed once per layer; a version then costs one product of W with its thin A. Both come in pieces
of bounded size, so that a caller can spread them over time. A quantised W is unpacked only for its own norms, a piece
at a time. Engine thread only, as everything that touches the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.math import gained_norm, squared_row_norms, unless_rounding
from adapters.prepare import HostDelta

BLOCK_VALUES = 1 << 24
"""Of W, unpacked to float32 at a time: 64 MB."""
OWN_NORMS = 4
"""What the norms of W cost next to one product with an A of rank `THIN`: they read and square every value."""
THIN = 16

QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


class RowNorms:
    """Of one base, whose weights never change: ‖W‖² of each row [out], by the layer's path."""

    def __init__(self) -> None:
        self.squared: dict[str, NDArray[np.float64]] = {}

    def begin(self, path: str, weights: Rows, delta: HostDelta) -> AdaptedNorms:
        """‖W + scale · B · A‖ of the layer at `path`, to be gathered piece by piece."""
        return AdaptedNorms(self, path, weights, delta)


@dataclass(slots=True)
class AdaptedNorms:
    """Of one layer: dispatch every piece, then `finish`."""

    known: RowNorms
    path: str
    weights: Rows
    delta: HostDelta
    _left: list[slice] = field(init=False)
    _factors: tuple[mx.array, mx.array] | None = None
    _products: list[mx.array] = field(default_factory=list)
    _squares: list[mx.array] = field(default_factory=list)
    _inner: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        self._left = list(_blocks(self.weights.layer))[::-1]

    @property
    def dispatched(self) -> bool:
        return not self._left

    def next_piece(self) -> tuple[list[mx.array], int]:
        """(what to evaluate, what it costs in values of W times a thin A), for the next block of W."""
        if self._factors is None:
            self._factors = mx.array(self.delta.a), mx.array(self.delta.b)
        block, fresh = self._left.pop(), self.path not in self.known.squared
        self._products.append(self.weights.products(block, *self._factors))
        values = (block.stop - block.start) * _width(self.weights.layer)
        cost = values * max(1, self.delta.a.shape[0] // THIN)
        if not fresh:
            return [self._products[-1]], cost
        self._squares.append(self.weights.squares(block))
        return [self._products[-1], self._squares[-1]], cost + OWN_NORMS * values

    def finish(self) -> NDArray[np.float64]:
        """The norm of each row [out]. Waits for pieces that are still being computed."""
        if self._squares:
            self.known.squared[self.path] = self.weights.joined(self._squares)
        base, delta = self.known.squared[self.path], self.delta
        products = self.weights.joined(self._products)
        self._inner = delta.scale * products
        squared, cancelled = squared_row_norms(base, products, delta.squared, delta.scale)
        if cancelled.size:
            rows = self.weights.rows(cancelled).astype(np.float64)
            rows += delta.scale * (delta.b[cancelled].astype(np.float64) @ delta.a.astype(np.float64))
            squared[cancelled] = np.square(rows).sum(axis=1)
        self._factors = None
        self._products = []
        return np.sqrt(np.maximum(squared, 0.0))

    def change(self, gain: NDArray[np.float64]) -> float:
        """‖gain · (W + scale · B · A) − W‖ (Frobenius) with a gain for each row [out]; after `finish`."""
        if self._inner is None:
            raise RuntimeError(f"The norms of {self.path} are not finished.")
        base, added = self.known.squared[self.path], self.delta.squared
        norm = gained_norm(gain.astype(np.float64), base, self._inner, added)
        return unless_rounding(norm, float(np.sqrt(base.sum())), zero=not added.any())


@dataclass(frozen=True, slots=True)
class Rows:
    """W of a linear layer, or of a tied head, whose table it is. A block is some of its rows."""

    layer: nn.Module

    def squares(self, block: slice) -> mx.array:
        """‖W‖² of each row of the block, float32, lazily."""
        return mx.square(_rows(self.layer, block)).sum(axis=1)

    def products(self, block: slice, a: mx.array, b: mx.array) -> mx.array:
        """⟨w, (B · A)'s row⟩ for each row w of the block, float32 whatever the layer's dtype, lazily; A [rank, in] and
        B [out, rank]. Summed over the thin products w · Aᵀ: nothing of the size of W is formed."""
        return (_thin_product(self.layer, block, a) * b[block]).sum(axis=1)

    def joined(self, pieces: list[mx.array]) -> NDArray[np.float64]:
        """Of all rows, from the blocks in their order."""
        return np.concatenate([np.array(piece) for piece in pieces]).astype(np.float64)

    def rows(self, which: NDArray[np.intp]) -> NDArray[np.float32]:
        """[which, in]"""
        return np.array(_rows(self.layer, mx.array(which.astype(np.uint32))))


@dataclass(frozen=True, slots=True)
class TableRows(Rows):
    """W of an embedding: its table [vocabulary, out] transposed. A block is some of its columns."""

    def squares(self, block: slice) -> mx.array:
        return mx.square(_rows(self.layer, block)).sum(axis=0)

    def products(self, block: slice, a: mx.array, b: mx.array) -> mx.array:
        return ((_rows(self.layer, block).T @ a[:, block].T) * b).sum(axis=1)

    def joined(self, pieces: list[mx.array]) -> NDArray[np.float64]:
        return np.sum([np.array(piece) for piece in pieces], axis=0, dtype=np.float64)

    def rows(self, which: NDArray[np.intp]) -> NDArray[np.float32]:
        columns = mx.array(which.astype(np.uint32))
        return np.concatenate([np.array(_rows(self.layer, block)[:, columns]) for block in _blocks(self.layer)]).T


def _thin_product(layer: nn.Module, block: slice, thin: mx.array) -> mx.array:
    """W · Aᵀ for some rows of W, [rows, rank], in float32 whatever the layer's dtype."""
    if not isinstance(layer, QUANTISED):
        return _rows(layer, block) @ thin.T
    scales, biases = _scales(layer, block)
    return mx.quantized_matmul(
        thin,
        layer["weight"][block],
        scales,
        biases,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    ).T


def _width(layer: nn.Module) -> int:
    """Values in a row of W, as the layer holds it."""
    packed: int = layer["weight"].shape[-1]
    return packed * 32 // layer.bits if isinstance(layer, QUANTISED) else packed


def _blocks(layer: nn.Module) -> Iterator[slice]:
    out = layer["weight"].shape[0]
    step = max(BLOCK_VALUES // _width(layer), 1)
    return (slice(start, min(start + step, out)) for start in range(0, out, step))


def _rows(layer: nn.Module, which: slice | mx.array) -> mx.array:
    """Rows of W, unpacked, float32 [rows, in]."""
    weight: mx.array = layer["weight"][which]
    if not isinstance(layer, QUANTISED):
        return weight.astype(mx.float32)
    scales, biases = _scales(layer, which)
    return mx.dequantize(weight, scales, biases, layer.group_size, layer.bits, layer.mode, dtype=mx.float32)


def _scales(layer: nn.Module, which: slice | mx.array) -> tuple[mx.array, mx.array | None]:
    """Of some rows. In the affine mode they decide the product's dtype; in the others they are packed and have none."""
    scales, biases = layer["scales"][which], layer.get("biases")
    if biases is None:
        return scales, None
    return scales.astype(mx.float32), biases[which].astype(mx.float32)
