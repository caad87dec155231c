"""‖W + scale · B · A‖ of every row of a base's layers: what DoRA divides its magnitudes by.

Row norms of W are computed once per layer; a version then costs one product of W with its thin A. Both come in pieces
of bounded size, so that a caller can spread them over time. A quantised W is unpacked only for its own norms, a piece
at a time. Engine thread only, as everything that touches the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.numerics import gained_squares, squared_row_norms, unless_rounding
from adapters.prepare import HostDelta
from adapters.resident.cuts import Cut, summed

BLOCK_VALUES = 1 << 24
"""Values of W that are unpacked to float32 at a time: 64 MB."""
OWN_NORMS = 4
"""What the norms of W cost next to one product with an A of rank `THIN`: they read and square every value."""
THIN = 16

SMALL = 1_000_000
"""Multiplications in a product that OpenBLAS computes from the matrices as they lie, on one core."""
PANEL, LEAST = 64, 4
"""Rows of W in one of them, at most and at least."""

QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


class RowNorms:
    """‖W‖² of each row [out] of one base, whose weights never change, by the layer's path."""

    def __init__(self) -> None:
        self.squared: dict[str, NDArray[np.float64]] = {}

    def begin(self, path: str, weights: Rows, delta: HostDelta) -> AdaptedNorms:
        """‖W + scale · B · A‖ of the layer at `path`, to be gathered piece by piece."""
        return AdaptedNorms(self, path, weights, delta)


@dataclass(slots=True)
class AdaptedNorms:
    """The norms of one layer: dispatch every piece, then `gather`."""

    known: RowNorms
    path: str
    weights: Rows
    delta: HostDelta
    _left: list[slice] = field(init=False)
    _turned: mx.array | None = None
    _products: list[mx.array] = field(default_factory=list)
    _squares: list[mx.array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._left = list(_blocks(self.weights.layer))[::-1]

    @property
    def dispatched(self) -> bool:
        return not self._left

    def next_piece(self) -> tuple[list[mx.array], int]:
        """(what to evaluate, what it costs in values of W times a thin A), for the next block of W."""
        if self._turned is None:
            self._turned = self.weights.turned(self.delta.a)
        block, fresh = self._left.pop(), self.path not in self.known.squared
        self._products.append(self.weights.products(block, self._turned))
        values = (block.stop - block.start) * _width(self.weights.layer)
        cost = values * max(1, self.delta.a.shape[0] // THIN)
        if not fresh:
            return [self._products[-1]], cost
        self._squares.append(self.weights.squares(block))
        return [self._products[-1], self._squares[-1]], cost + OWN_NORMS * values

    def gather(self) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
        """(‖w‖² unless it is known, ⟨w, (B · A)'s row⟩) of each row, of a cut layer what this rank has of them. Waits
        for pieces that are still being computed."""
        squares = self.weights.joined(self._squares) if self._squares else None
        inner = self.weights.inner(self._products, self.delta.b)
        self._turned, self._products, self._squares = None, [], []
        return squares, inner

    def exact(self, which: NDArray[np.intp]) -> NDArray[np.float64]:
        """‖w + scale · b · A‖² of some rows, from the weights themselves."""
        delta = self.delta
        rows = self.weights.rows(which).astype(np.float64)
        rows += delta.scale * (delta.b[which].astype(np.float64) @ delta.a.astype(np.float64))
        squared: NDArray[np.float64] = np.square(rows).sum(axis=1)
        return squared


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """The rows of layers that are dispatched, one layer after another, float64 [rows]: numpy's calls for each of a
    hundred layers cost more than the numbers."""

    base: NDArray[np.float64]
    """‖w‖²"""
    inner: NDArray[np.float64]
    """⟨w, d⟩, where d is the row's part of scale · B · A."""
    added: NDArray[np.float64]
    """‖d‖²"""
    lengths: NDArray[np.float64]
    """‖w + d‖"""
    starts: NDArray[np.intp]
    """[layers], the first row of each."""

    @classmethod
    def of(cls, layers: Sequence[AdaptedNorms]) -> AdaptedRows:
        """Waits for pieces that are still being computed."""
        gathered = [layer.gather() for layer in layers]
        fresh = [layer for layer, (squares, _) in zip(layers, gathered, strict=True) if squares is not None]
        values = [squares for squares, _ in gathered if squares is not None] + [inner for _, inner in gathered]
        of = [*fresh, *layers]
        whole = summed([layer.weights.cut for layer in of], values, [len(layer.delta.b) for layer in of])
        for layer, squares in zip(fresh, whole, strict=False):
            layer.known.squared[layer.path] = squares
        base = np.concatenate([layer.known.squared[layer.path] for layer in layers])
        products = zip(layers, whole[len(fresh) :], strict=True)
        inner = np.concatenate([layer.delta.scale * product for layer, product in products])
        added = np.concatenate([layer.delta.squared for layer in layers])
        starts = np.cumsum([0, *(layer.delta.squared.size for layer in layers[:-1])])
        squared, cancelled = squared_row_norms(base, inner, added)
        owners = np.searchsorted(starts, cancelled, side="right") - 1
        for owner in np.unique(owners):
            rows = cancelled[owners == owner]
            squared[rows] = layers[owner].exact(rows - starts[owner])
        return cls(base, inner, added, np.sqrt(np.maximum(squared, 0.0)), starts)

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Values of all rows, as one array for each layer."""
        return np.split(values, self.starts[1:])

    def changes(self, gain: NDArray[np.float64]) -> list[float]:
        """‖gain · (W + scale · B · A) − W‖ (Frobenius) of each layer."""
        changed, base, added = (
            np.add.reduceat(values, self.starts)
            for values in (gained_squares(gain, self.base, self.inner, self.added), self.base, self.added)
        )
        norms = np.sqrt(np.maximum(changed, 0.0))
        return [
            unless_rounding(float(norm), float(whole), zero=not delta)
            for norm, whole, delta in zip(norms, np.sqrt(base), added, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Rows:
    """W of a linear layer, or of a tied head, whose table it is. A block is some of its rows."""

    layer: nn.Module
    cut: Cut | None = None
    """How the layer is cut over ranks; None where this one has all of it."""

    def turned(self, a: NDArray[np.float32]) -> mx.array:
        """Aᵀ [in, rank], of what this rank has of the inputs."""
        own = a if self.cut is None or self.cut.side == "outputs" else a[:, self.cut.own(a.shape[1])]
        return mx.array(own.T)

    def squares(self, block: slice) -> mx.array:
        """‖W‖² of each row of the block, float32, lazily."""
        return mx.square(_rows(self.layer, block)).sum(axis=1)

    def products(self, block: slice, turned: mx.array) -> mx.array:
        """w · Aᵀ for each row w of the block, [rows, rank] or panels of it, float32 whatever the layer's dtype, lazily;
        Aᵀ [in, rank]. Nothing of the size of W is formed."""
        return _thin_product(self.layer, block, turned)

    def inner(self, products: list[mx.array], b: NDArray[np.float32]) -> NDArray[np.float64]:
        """⟨w, (B · A)'s row⟩ of all rows, from the products of the blocks in their order; B [out, rank]. On the host,
        where it is next to nothing: each further operation of so many layers holds up the device's queue. Of a cut
        layer what this rank has of them."""
        b = b if self.cut is None else self.cut.gain(b)
        parts = [np.asarray(piece).reshape(-1, b.shape[1]) for piece in products]
        of_rows = np.split(b, np.cumsum([len(part) for part in parts[:-1]], dtype=int))
        return np.concatenate([_row_sums(*pair) for pair in zip(parts, of_rows, strict=True)], dtype=np.float64)

    def joined(self, pieces: list[mx.array]) -> NDArray[np.float64]:
        """Values of all rows, from the blocks in their order."""
        return np.concatenate([np.asarray(piece) for piece in pieces], dtype=np.float64)

    def rows(self, which: NDArray[np.intp]) -> NDArray[np.float32]:
        """[which, in]; of a cut layer each rank brings what it has, and all of them ask for the same rows."""
        if self.cut is None:
            return np.array(_rows(self.layer, mx.array(which.astype(np.uint32))))
        size, out, width = self.cut.group.size(), self.layer["weight"].shape[0], _width(self.layer)
        outputs = self.cut.side == "outputs"
        found = np.zeros((len(which), width if outputs else width * size), np.float32)
        own = self.cut.own(out * size) if outputs else slice(0, out)
        mine = np.flatnonzero((which >= own.start) & (which < own.stop))
        if len(mine):
            columns = slice(None) if outputs else self.cut.own(width * size)
            found[mine, columns] = np.array(_rows(self.layer, mx.array((which[mine] - own.start).astype(np.uint32))))
        return np.array(mx.distributed.all_sum(mx.array(found), group=self.cut.group))


@dataclass(frozen=True, slots=True)
class TableRows(Rows):
    """W of an embedding: its table [vocabulary, out] transposed. A block is some of its columns."""

    def squares(self, block: slice) -> mx.array:
        return mx.square(_rows(self.layer, block)).sum(axis=0)

    def products(self, block: slice, turned: mx.array) -> mx.array:
        return _rows(self.layer, block).T @ turned[block]

    def inner(self, products: list[mx.array], b: NDArray[np.float32]) -> NDArray[np.float64]:
        return _row_sums(self.joined(products), b)

    def joined(self, pieces: list[mx.array]) -> NDArray[np.float64]:
        return np.sum([np.asarray(piece) for piece in pieces], axis=0, dtype=np.float64)

    def rows(self, which: NDArray[np.intp]) -> NDArray[np.float32]:
        columns = mx.array(which.astype(np.uint32))
        return np.concatenate([np.array(_rows(self.layer, block)[:, columns]) for block in _blocks(self.layer)]).T


def _row_sums(products: NDArray[Any], b: NDArray[np.float32]) -> NDArray[Any]:
    sums: NDArray[Any] = np.einsum("or,or->o", products, b)
    return sums


def _thin_product(layer: nn.Module, block: slice, turned: mx.array) -> mx.array:
    """W · Aᵀ for some rows of W, [rows, rank] or panels of it, in float32 whatever the layer's dtype; Aᵀ [in, rank]."""
    if not isinstance(layer, QUANTISED):
        return _panelled(_rows(layer, block), turned)
    scales, biases = _scales(layer, block)
    return mx.quantized_matmul(
        turned.T,
        layer["weight"][block],
        scales,
        biases,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    ).T


def _panelled(rows: mx.array, thin: mx.array) -> mx.array:
    """[rows, in] · [in, rank] as [panels, rows, rank], many small products, where it divides: for a large one a BLAS
    first copies W into panels of its own, which costs more than a thin product, and wakes its threads. A GPU does
    neither."""
    (count, width), rank = rows.shape, thin.shape[1]
    most = min(PANEL, SMALL // (width * rank), count)
    panel = next((size for size in range(most, LEAST - 1, -1) if count % size == 0), None)
    if panel is None or mx.default_device() != mx.cpu:
        return rows @ thin
    panels = rows.reshape(-1, panel, width)
    return panels @ mx.broadcast_to(thin, (panels.shape[0], width, rank))


def _width(layer: nn.Module) -> int:
    """Values in a row of W, as the layer holds it."""
    packed: int = layer["weight"].shape[-1]
    return packed * 32 // layer.bits if isinstance(layer, QUANTISED) else packed


def _blocks(layer: nn.Module) -> Iterator[slice]:
    out = layer["weight"].shape[0]
    step = max(BLOCK_VALUES // _width(layer), 1)
    step -= step % PANEL if step > PANEL else 0
    return (slice(start, min(start + step, out)) for start in range(0, out, step))


def _rows(layer: nn.Module, which: slice | mx.array) -> mx.array:
    """Rows of W, unpacked, float32 [rows, in]."""
    weight: mx.array = layer["weight"][which]
    if not isinstance(layer, QUANTISED):
        return weight.astype(mx.float32)
    scales, biases = _scales(layer, which)
    return mx.dequantize(weight, scales, biases, layer.group_size, layer.bits, layer.mode, dtype=mx.float32)


def _scales(layer: nn.Module, which: slice | mx.array) -> tuple[mx.array, mx.array | None]:
    """Scales and biases of some rows. In the affine mode they decide the product's dtype; in others there are no
    biases."""
    scales, biases = layer["scales"][which], layer.get("biases")
    if biases is None:
        return scales, None
    return scales.astype(mx.float32), biases[which].astype(mx.float32)
