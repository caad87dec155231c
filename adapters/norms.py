"""‖W + scale · B · A‖ of every row of a base's layers: what DoRA divides its magnitudes by.

Row norms of W are computed once per layer; a version then costs one product of W with its thin A. A quantised W is
unpacked only for the norms, a block of rows at a time. Engine thread only, as everything that touches the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.math import squared_row_norms

BLOCK_VALUES = 1 << 24
"""Of W, unpacked to float32 at a time: 64 MB."""

QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


class RowNorms:
    """Of one base, whose weights never change."""

    def __init__(self) -> None:
        self._squared: dict[str, NDArray[np.float64]] = {}

    def adapted(
        self, path: str, weights: Rows, a: NDArray[np.float32], b: NDArray[np.float32], scale: float
    ) -> NDArray[np.float64]:
        """‖W + scale · B · A‖ of each row [out] of the layer at `path`, for A [rank, in] and B [out, rank]."""
        base = self._squared.get(path)
        if base is None:
            base = self._squared[path] = weights.squared()
        squared, cancelled = squared_row_norms(base, weights.times(a), a, b, scale)
        if cancelled.size:
            rows = weights.rows(cancelled).astype(np.float64)
            rows += scale * (b[cancelled].astype(np.float64) @ a.astype(np.float64))
            squared[cancelled] = np.square(rows).sum(axis=1)
        return np.sqrt(np.maximum(squared, 0.0))


@dataclass(frozen=True, slots=True)
class Rows:
    """W of a linear layer, or of a tied head, whose table it is."""

    layer: nn.Module

    def squared(self) -> NDArray[np.float64]:
        """‖W‖² of each row [out]."""
        sums = [np.array(mx.square(_rows(self.layer, block)).sum(axis=1)) for block in _blocks(self.layer)]
        return np.concatenate(sums).astype(np.float64)

    def times(self, a: NDArray[np.float32]) -> NDArray[np.float32]:
        """W · Aᵀ, [out, rank], in float32 whatever the layer's dtype."""
        return _thin_product(self.layer, a)

    def rows(self, which: NDArray[np.intp]) -> NDArray[np.float32]:
        """[which, in]"""
        return np.array(_rows(self.layer, mx.array(which.astype(np.uint32))))


@dataclass(frozen=True, slots=True)
class TableRows(Rows):
    """W of an embedding: its table [vocabulary, out] transposed."""

    def squared(self) -> NDArray[np.float64]:
        blocks = _blocks(self.layer)
        return np.sum(
            [np.array(mx.square(_rows(self.layer, block)).sum(axis=0)) for block in blocks], axis=0, dtype=float
        )

    def times(self, a: NDArray[np.float32]) -> NDArray[np.float32]:
        products = [np.array(_rows(self.layer, block).T @ mx.array(a[:, block]).T) for block in _blocks(self.layer)]
        return np.sum(products, axis=0, dtype=np.float32)

    def rows(self, which: NDArray[np.intp]) -> NDArray[np.float32]:
        columns = mx.array(which.astype(np.uint32))
        return np.concatenate([np.array(_rows(self.layer, block)[:, columns]) for block in _blocks(self.layer)]).T


def _thin_product(layer: nn.Module, a: NDArray[np.float32]) -> NDArray[np.float32]:
    """W · Aᵀ, [out, rank], in float32 whatever the layer's dtype."""
    thin = mx.array(a)
    if not isinstance(layer, QUANTISED):
        return np.concatenate([np.array(_rows(layer, block) @ thin.T) for block in _blocks(layer)])
    scales, biases = _scales(layer, slice(None))
    product = mx.quantized_matmul(
        thin,
        layer["weight"],
        scales,
        biases,
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
    return np.array(product).T


def _blocks(layer: nn.Module) -> Iterator[slice]:
    out, packed = layer["weight"].shape
    width = packed * 32 // layer.bits if isinstance(layer, QUANTISED) else packed
    step = max(BLOCK_VALUES // width, 1)
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
