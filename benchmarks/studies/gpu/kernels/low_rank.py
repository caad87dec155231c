"""How long the adapters' kernel takes for the layers of one block, by how a launch is shared out over threads.

By the device's own clock, since a launch costs the host about as much. Every way is compared with plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from adapters.kernels.decode import DecodeKernel, Geometry, LowRank
from adapters.kernels.text import own_device
from benchmarks.studies.gpu.figures import Figure
from benchmarks.studies.gpu.held import Held
from benchmarks.studies.gpu.kernels.launches import kernels_of
from benchmarks.studies.gpu.shapes import COMMON, SHAPES

RANK, REPEATS = 16, 20
WAYS = [
    Geometry(parts, rows, columns)
    for rows, parts, columns in [
        *((4, 4, columns) for columns in (2, 4, 8)),
        *((4, 8, columns) for columns in (1, 2, 4)),
        *((4, 2, columns) for columns in (4, 8)),
        *((2, 8, columns) for columns in (4, 8)),
        *((8, 2, columns) for columns in (4, 8)),
    ]
]


def low_rank(held: Held) -> Iterator[Figure]:
    """Microseconds of a launch for each group of layers that share an input, and how far it is from plain products."""
    device = own_device()
    if device is None:
        raise RuntimeError("There is no kernel for a CPU.")
    for name, (width, outs) in groups(held.size.shape).items():
        x = mx.random.normal((held.size.rows, width)).astype(mx.bfloat16)
        layers = [a_layer(held.size.rows, width, out) for out in outs]
        rows = mx.array([1], dtype=mx.uint32)
        mx.eval(x, rows, *((layer.y, layer.a, layer.b) for layer in layers))
        expected = [plainly(x, layer) for layer in layers]
        for way in WAYS:
            kernel = DecodeKernel(device, geometry=way)
            label = f"{name} ({width} to {' + '.join(map(str, outs))}), {way.parts}/{way.rows}/{way.columns}"
            try:
                found = kernel(x, rows, layers)
                mx.eval(found)
            except RuntimeError as error:
                yield Figure(f"{label}: {' '.join(str(error).split())[:60]}", "µs", (float("inf"),))
                continue
            gaps = [mx.max(mx.abs(a.astype(mx.float32) - b)) for a, b in zip(found, expected, strict=True)]
            seen = kernels_of(partial(launched, partial(kernel, x, rows, layers)))
            mine = [each for each in seen if "low_rank" in each[0]]
            yield Figure(label, "µs", (sum(each[1] for each in mine) / sum(each[2] for each in mine),))
            yield Figure(f"{label}: from plain products", "", (max(float(gap) for gap in gaps),))


def launched(kernel: Callable[[], list[mx.array]]) -> None:
    for _ in range(REPEATS):
        mx.eval(kernel())


def groups(shape: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Layers of a block that share an input: their inputs, and the outputs of each."""
    size = COMMON | SHAPES[shape]
    width, inner, head = size["hidden_size"], size["intermediate_size"], size["head_dim"]
    queries, keys = size["num_attention_heads"] * head, size["num_key_value_heads"] * head
    return {
        "q, k, v": (width, (queries, keys, keys)),
        "o": (queries, (width,)),
        "gate, up": (width, (inner, inner)),
        "down": (inner, (width,)),
    }


def a_layer(rows: int, width: int, out: int) -> LowRank:
    """One version, in slot 1."""
    y, a, b = mx.random.normal((rows, out)), mx.random.normal((2, RANK, width)), mx.random.normal((2, RANK, out))
    return LowRank(*(array.astype(mx.bfloat16) for array in (y, a * width**-0.5, b * RANK**-0.5)))


def plainly(x: mx.array, layer: LowRank) -> mx.array:
    """float32 [rows, out]."""
    wide, y, a, b = (array.astype(mx.float32) for array in (x, layer.y, layer.a[1], layer.b[1]))
    return y + (wide @ a.T) @ b
