"""Measures of a delta, against the formula that makes a copy for every step."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.bundle import make_bundle, measured
from adapters.numerics import PIECE, DeltaMeasure, Grams, Results, Scratch, in_pieces, joined, largest, measure
from adapters.report import report
from adapters.spec import AdapterSpec, ModuleSpec
from adapters.tensors import AdapterTensor

SHAPES = ((16, 1024, 2048), (3, 10, 6), (1, 1, 1), (8, 5, 7), (40, 9, 4))
"""(rank, in, out); the last two have a rank above what a product can have."""


def plainly(a: NDArray[np.float32], b: NDArray[np.float32], scale: float) -> DeltaMeasure:
    """Everything in float64, in arrays of its own."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    if a.shape[0] <= min(a.shape[1], b.shape[0]):
        squared = float(np.sum((wide_b.T @ wide_b) * (wide_a @ wide_a.T)))
    else:
        squared = float(np.square(wide_b @ wide_a).sum())
    largest_a, largest_b = float(np.abs(wide_a).max()), float(np.abs(wide_b).max()) * abs(scale)
    return DeltaMeasure(
        norm=abs(scale) * float(np.sqrt(max(squared, 0.0))),
        largest=max(largest_a, largest_b),
        zero=largest_a == 0 or largest_b == 0,
    )


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("scale", [2.0, -0.3, 0.0])
def test_measures_are_the_plain_formula_bit_for_bit(size: float, scale: float) -> None:
    """Of thin factors. A rank above the width is measured through the product: there, rounding apart."""
    random, scratch = np.random.default_rng(0), Scratch()
    for rank, width, out in SHAPES:
        for empty in (1.0, 0.0):
            a = (random.normal(size=(rank, width)) * size).astype(np.float32)
            b = (random.normal(size=(out, rank)) * size * empty).astype(np.float32)
            found, expected = measure(a, b, scale, Grams.of(a, b, scratch)), plainly(a, b, scale)
            assert (found.largest, found.zero) == (expected.largest, expected.zero)
            if rank <= min(width, out):
                assert found.norm == expected.norm
            # Each entry is a sum of min(out, in) products, each of them rounded once.
            bound = (min(out, width) + width * out) * np.finfo(np.float64).eps
            assert found.norm == pytest.approx(expected.norm, rel=bound, abs=0.0)


@pytest.mark.parametrize("values", [[-3.0, 1.0], [3.0, -1.0], [-2.0, -1.0], [0.0, -0.0], []])
def test_the_largest_magnitude_needs_no_copy(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert largest(array) == float(np.abs(array).max(initial=0.0))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_bundle_is_measured_with_each_layer_by_itself(dtype: str) -> None:
    """Memory that is used again takes nothing from one layer into the next."""
    random, modules, tensors, factors = np.random.default_rng(1), {}, {}, {}
    for at, (rank, width, out) in enumerate(SHAPES):
        path = f"layers.{at}"
        modules[path] = ModuleSpec(rank, 0.5 + at)
        for half, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
            bits = random.integers(0x2000, 0x3C00, shape).astype(np.uint16)
            array = {"F32": bits.astype(np.float32), "F16": bits.view(np.float16), "BF16": bits}[dtype]
            tensors[f"{path}.{half}"] = AdapterTensor(dtype, array)
        factors[path] = [tensors[f"{path}.{half}"].float32() for half in ("lora_A", "lora_B")]
    spec = AdapterSpec("lora", modules)
    found = measured(spec, tensors)
    for path, module in modules.items():
        a, b = factors[path]
        assert found.bundle.measures[path] == measure(a, b, module.scale, Grams.of(a, b, Scratch()))
    assert found.bundle == make_bundle(spec, tensors)
    assert report(*found) == report(found.bundle), "what is passed on is what would be computed again"


def test_pieces_are_all_rows_once_and_small() -> None:
    for shape in ((1, 5), (3, PIECE), (10 * PIECE, 3), (0, 4), (7,)):
        rows = np.empty(shape, np.uint8)
        cut = list(in_pieces(rows))
        assert [row for piece in cut for row in range(*piece.indices(len(rows)))] == list(range(len(rows)))
        assert all(len(rows[piece]) == 1 or rows[piece].size <= PIECE for piece in cut)


def test_joined_bytes_are_those_of_the_pieces_and_nobody_can_write_into_them() -> None:
    pieces = [b"ab", bytearray(b"c"), memoryview(b"xdefx")[1:-1]]
    whole = joined(pieces)
    assert whole == b"abcdef" and whole.readonly
    assert joined([]) == b"" and joined([b""]) == b""


def test_results_lie_side_by_side() -> None:
    results = Results(10, np.uint16)
    first, second = results.array((2, 3)), results.array((4,))
    first[:], second[:] = 1, 2
    assert first.base is not None and np.array_equal(first, np.ones((2, 3))) and np.array_equal(second, [2] * 4)
