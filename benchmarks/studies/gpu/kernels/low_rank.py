"""How long the adapters' kernels take for the layers of one block, by how a launch is shared out.

By the device's own clock, since a launch costs the host about as much. Every way is compared with plain products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from adapters.kernels.decode import DecodeKernel, Geometry
from adapters.kernels.low_rank import LowRank, LowRankKernel
from adapters.kernels.matrix import MatrixKernel, Share
from adapters.kernels.numbers import device_numbers
from adapters.kernels.text import Device, own_device
from benchmarks.studies.gpu.figures import Figure
from benchmarks.studies.gpu.held import Held
from benchmarks.studies.gpu.kernels.launches import kernels_of
from benchmarks.studies.gpu.shapes import COMMON, SHAPES

RANK, REPEATS = 16, 20
THREADS = [Geometry(4, 4, 4), Geometry(8, 4, 2), Geometry(4, 4, 2)]
SHARES = [Share(8, 256, 2), Share(8, 128, 2), Share(8, 256, 4), Share(16, 128, 2), Share(4, 256, 4)]


def ways(device: Device) -> dict[str, LowRankKernel]:
    """Kernels by what they are called here."""
    found: dict[str, LowRankKernel] = {
        f"threads {way.parts}/{way.rows}/{way.columns}": DecodeKernel(device, geometry=way) for way in THREADS
    }
    if device == "cuda":
        found |= {
            f"matrix units {way.warps}/{way.blocks}/{way.steps}": MatrixKernel(device, share=way) for way in SHARES
        }
    return found


def low_rank(held: Held) -> Iterator[Figure]:
    """Microseconds of a launch for each group of layers that share an input, and how far it is from plain products."""
    device = own_device()
    if device is None:
        raise RuntimeError("There is no kernel for a CPU.")
    kernels = ways(device)
    for name, (width, outs) in groups(held.size.shape).items():
        x = mx.random.normal((held.size.rows, width)).astype(mx.bfloat16)
        layers = [a_layer(held.size.rows, width, out) for out in outs]
        rows, few_bytes = device_numbers([1], mx.uint32), mx.array([1], dtype=mx.uint32)
        mx.eval(x, rows, few_bytes, *((layer.y, layer.a, layer.b) for layer in layers))
        expected = [plainly(x, layer) for layer in layers]
        for way, kernel in kernels.items():
            label = f"{name} ({width} to {' + '.join(map(str, outs))}), {way}"
            try:
                found = kernel(x, rows, layers)
                mx.eval(found)
            except RuntimeError as error:
                yield Figure(f"{label}: {' '.join(str(error).split())[:60]}", "µs", (float("inf"),))
                continue
            gaps = [mx.max(mx.abs(a.astype(mx.float32) - b)) for a, b in zip(found, expected, strict=True)]
            yield Figure(label, "µs", (microseconds(partial(kernel, x, rows, layers)),))
            yield Figure(f"{label}, the slot in 4 bytes", "µs", (microseconds(partial(kernel, x, few_bytes, layers)),))
            yield Figure(f"{label}: from plain products", "", (max(float(gap) for gap in gaps),))


def microseconds(kernel: Callable[[], list[mx.array]]) -> float:
    """What the device takes for one of many launches."""
    mine = [each for each in kernels_of(partial(launched, kernel)) if "low_rank" in each[0]]
    return sum(each[1] for each in mine) / sum(each[2] for each in mine)


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
