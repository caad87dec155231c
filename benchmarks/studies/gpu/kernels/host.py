"""What one operation costs the host in a decode step, where many stand in one traced function: to build, and to hand
over to the device. No model is loaded; the device has next to nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlx.core as mx

from adapters.kernels.low_rank import LowRank
from adapters.kernels.numbers import device_numbers
from adapters.resident.kernel_choice import kernels
from benchmarks.studies.gpu.figures import Figure
from benchmarks.studies.gpu.held import Held

OPERATIONS, WIDTH, RANK = 200, 1024, 16

Operation = Callable[[mx.array, Sequence[mx.array]], mx.array]
"""One of the chain: x [rows, 1, width] and the arrays that are its own → x."""


def host(held: Held) -> Iterator[Figure]:
    """Microseconds of one operation in a chain of `OPERATIONS`, each with arrays of its own."""
    x = mx.random.normal((held.size.few, 1, WIDTH)).astype(mx.bfloat16)
    for name, (operation, shapes) in operations().items():
        own = [[mx.random.normal(shape).astype(mx.bfloat16) for shape in shapes] for _ in range(OPERATIONS)]
        mx.eval(x, own)
        build, over = zip(*_timed(operation, x, own, held.rounds), strict=True)
        yield Figure(f"{name}: to build", "µs", build)
        yield Figure(f"{name}: to hand over", "µs", over)


def operations() -> Mapping[str, tuple[Operation, Sequence[tuple[int, ...]]]]:
    """By name, with the shapes of what each has of its own; kernels for adapters only where there is a GPU."""
    found: dict[str, tuple[Operation, Sequence[tuple[int, ...]]]] = {
        "rms norm": (lambda x, own: mx.fast.rms_norm(x, own[0], 1e-6), [(WIDTH,)]),
        "product": (lambda x, own: x @ own[0], [(WIDTH, WIDTH)]),
    }
    if tried := kernels():
        kernel, slot = tried[0], device_numbers([1], mx.uint32)
        found["adapters' kernel, one layer"] = (
            lambda x, own: kernel(x, slot, [LowRank(x, *own)])[0],
            [(2, RANK, WIDTH), (2, RANK, WIDTH)],
        )
    return found


def _timed(operation: Operation, x: mx.array, own: list[list[mx.array]], rounds: int) -> Iterator[tuple[float, float]]:
    """Microseconds an operation (to build, to hand over), of each round behind one that traces and compiles."""

    def chain(x: mx.array, own: list[list[mx.array]]) -> mx.array:
        for each in own:
            x = operation(x, each)
        return x

    # As the engine does: on a CPU no step is traced.
    function = chain if mx.default_device() == mx.cpu else mx.compile(chain)
    for number in range(rounds + 1):
        began = time.perf_counter()
        found = function(x, own)
        built = time.perf_counter()
        mx.async_eval(found)
        handed = time.perf_counter()
        mx.eval(found)
        if number:
            yield 1e6 * (built - began) / OPERATIONS, 1e6 * (handed - built) / OPERATIONS
