"""The kernel for adapters on matrix units against plain products: on this machine's GPU where it has one, and its text
by the processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.kernels.decode import DecodeKernel
from adapters.kernels.low_rank import MOST_RANK, LowRank
from adapters.kernels.matrix import MatrixKernel, Share
from adapters.kernels.text import Device, Launch, own_device
from tests.adapters.kernels.test_decode import a_stack, assert_as_one_by_one
from tests.laws.grids import corners, some_long
from tests.support.numbers.host_kernels import host_compiler

HALVES = [mx.bfloat16, mx.float16]
KINDS = ["the GPU", "the processor"]
SHARES = [Share(2, 1, 1), Share(4, 64, 4), Share(16, 8, 2)]
"""Few blocks compute several sets of columns each; a thread has 16, 8 or 2 rows."""


@pytest.fixture(scope="module", params=KINDS)
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MatrixKernel:
    if request.param == "the processor":
        return MatrixKernel("cuda", host_compiler(tmp_path_factory))
    if own_device() != "cuda":
        pytest.skip("There is no GPU for CUDA.")
    return MatrixKernel("cuda")


def a_layer(shape: tuple[int, int], dtype: mx.Dtype, *, bias: bool = False) -> nn.Linear:
    base = nn.Linear(shape[1], shape[0], bias=bias)
    base.set_dtype(dtype)
    return base


@pytest.mark.parametrize(
    ("shape", "dtype", "gains", "bias"),
    corners([(48, 264), (514, 72), (1024, 64)], HALVES, [False, True], [False, True]),
    ids=str,
)
def test_rows_get_what_plain_products_give(
    kernel: MatrixKernel, shape: tuple[int, int], dtype: mx.Dtype, gains: bool, bias: bool
) -> None:
    base, stack = a_layer(shape, dtype, bias=bias), a_stack(shape, dtype, gains=gains)
    for slots in ([0], [1], [2] * 17, [0, 3, 1, 2, 0], [3] * 16, [2, 0, 3] * 11, [1] * 4 + [2] * 4 + [0] * 4 + [3] * 9):
        assert_as_one_by_one(kernel, stack, base, slots, dtype)


def test_inputs_that_a_warp_reads_in_turns(kernel: MatrixKernel) -> None:
    base, stack = a_layer((48, 2056), mx.bfloat16), a_stack((48, 2056), mx.bfloat16, gains=False)
    assert_as_one_by_one(kernel, stack, base, [3, 0, 3, 2, 2], mx.bfloat16)


@pytest.mark.parametrize("rank", [8, 24, 32, MOST_RANK - 8, MOST_RANK])
def test_ranks_are_read_sixteen_at_a_time(kernel: MatrixKernel, rank: int) -> None:
    base = a_layer((302, 72), mx.bfloat16)
    stack = a_stack((302, 72), mx.bfloat16, gains=False, ranks={1: rank, 3: rank - 5})
    for slots in ([1, 0, 3, 1, 1], [3] * 9):
        assert_as_one_by_one(kernel, stack, base, slots, mx.bfloat16)


@pytest.mark.parametrize("share", some_long(SHARES, SHARES[0]), ids=str)
def test_however_a_launch_is_shared_out(kernel: MatrixKernel, share: Share) -> None:
    made = MatrixKernel(kernel.device, kernel.compiler, share)
    base, stack = a_layer((700, 264), mx.bfloat16), a_stack((700, 264), mx.bfloat16, gains=True)
    for slots in ([3, 0, 3, 2, 2], [2] * 35):
        assert_as_one_by_one(made, stack, base, slots, mx.bfloat16)


def test_a_row_depends_neither_on_the_others_nor_on_which_layers_share_the_launch(kernel: MatrixKernel) -> None:
    width, slots = 72, [2, 0, 3, 1, 1, 2, 2] * 6
    stacks = [a_stack((out, width), mx.bfloat16, gains=True) for out in (514, 24)]
    x = mx.random.normal((len(slots), 1, width)).astype(mx.bfloat16)
    ys = [mx.random.normal((len(slots), 1, stack.out)).astype(mx.bfloat16) for stack in stacks]
    layers = [LowRank(y, stack.a, stack.b, stack.gain) for y, stack in zip(ys, stacks, strict=True)]
    together = kernel(x, mx.array(slots, dtype=mx.uint32), layers)
    for row in (0, 1, 2, 3, 4, 41):
        one = mx.array([slots[row]], dtype=mx.uint32)
        for every, y, layer in zip(together, ys, layers, strict=True):
            own = LowRank(y[row : row + 1], layer.a, layer.b, layer.gain)
            (alone,) = kernel(x[row : row + 1], one, [own])
            assert mx.array_equal(every[row], alone[0])


def test_a_row_that_is_not_finite_harms_no_other(kernel: MatrixKernel) -> None:
    stack, rows = a_stack((514, 72), mx.bfloat16, gains=False), mx.array([1, 2, 0] * 6, dtype=mx.uint32)
    x = mx.random.normal((18, 1, 72)).astype(mx.bfloat16)
    y = mx.random.normal((18, 1, 514)).astype(mx.bfloat16)
    spoilt = mx.where(mx.arange(18)[:, None, None] == 4, mx.array(mx.nan, mx.bfloat16), x)
    (clean,), (found,) = (kernel(each, rows, [LowRank(y, stack.a, stack.b)]) for each in (x, spoilt))
    others = [row for row in range(18) if row != 4]
    assert mx.array_equal(found[mx.array(others)], clean[mx.array(others)])
    assert mx.all(mx.isnan(found[4]))


def test_what_it_is_not_written_for_goes_another_way() -> None:
    kernel, x = MatrixKernel("cuda"), mx.zeros((4, 1, 64), mx.bfloat16)
    assert kernel.takes(x, (48, 64), 16, mx.bfloat16)
    assert kernel.takes(x.astype(mx.float16), (48, 64), 8, mx.float16)
    assert not kernel.takes(x.astype(mx.float32), (48, 64), 16, mx.float32), "float32 would be rounded to TF32"
    assert not kernel.takes(x, (49, 64), 16, mx.bfloat16), "two outputs of a thread would be of two rows"
    assert not kernel.takes(mx.zeros((4, 2, 64), mx.bfloat16), (48, 64), 16, mx.bfloat16), "prompts"
    assert not kernel.takes(x, (48, 64), MOST_RANK + 8, mx.bfloat16), "ranks beyond its shared memory"


@pytest.mark.parametrize("kind", [MatrixKernel, DecodeKernel])
def test_a_launch_is_all_that_it_costs(kind: type[MatrixKernel | DecodeKernel]) -> None:
    """No array is reshaped before or behind it: the host would hand over eighteen more operations for each block."""
    seen: list[Sequence[mx.array]] = []

    def compiler(device: Device, name: str, inputs: Sequence[str], outputs: Sequence[str], *text: str) -> Launch:
        def launch(*, inputs: Sequence[mx.array], output_shapes: Sequence[tuple[int, ...]], **_: Any) -> list[mx.array]:
            seen.extend([inputs, given := [mx.zeros(shape) for shape in output_shapes]])
            return given

        return launch

    x, rows = mx.zeros((3, 1, 64), mx.bfloat16), mx.array([1], dtype=mx.uint32)
    layers = [
        LowRank(*(mx.zeros(shape, mx.bfloat16) for shape in ((3, 1, out), (2, 8, 64), (2, 8, out)))) for out in (48, 16)
    ]
    found = kind("cuda", compiler)(x, rows, layers)
    inputs, outputs = seen
    expected = [x, rows, *(array for layer in layers for array in (layer.y, layer.a, layer.b))]
    assert all(one is other for one, other in zip(inputs, expected, strict=True))
    assert all(one is other for one, other in zip(found, outputs, strict=True))
    assert [output.shape for output in found] == [layer.y.shape for layer in layers]


@pytest.mark.parametrize("shape", [(5, 72), (5, 1, 1, 72)], ids=str)
def test_rows_may_come_in_any_dimensions(kernel: MatrixKernel, shape: tuple[int, ...]) -> None:
    """By the text that was tried at load, which knows [rows, 1, numbers]."""
    stack, rows = a_stack((514, 72), mx.bfloat16, gains=True), mx.array([1, 2, 0, 3, 3], dtype=mx.uint32)
    x = mx.random.normal((5, 1, 72)).astype(mx.bfloat16)
    y = mx.random.normal((5, 1, 514)).astype(mx.bfloat16)
    (expected,) = kernel(x, rows, [LowRank(y, stack.a, stack.b, stack.gain)])
    other = LowRank(y.reshape(*shape[:-1], 514), stack.a, stack.b, stack.gain)
    (found,) = kernel(x.reshape(shape), rows, [other])
    assert found.shape == other.y.shape and mx.array_equal(found.reshape(expected.shape), expected)
