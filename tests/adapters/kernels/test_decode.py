"""The kernel for adapters by threads against plain products: on this machine's GPU where it has one, and its text
for CUDA and Metal by the processor."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters.kernels.decode import DecodeKernel, Geometry
from adapters.kernels.low_rank import MOST_RANK, LowRank
from adapters.kernels.text import own_device
from adapters.resident.layers.linear import AdaptedLinear
from adapters.resident.layers.slot_stack import SlotStack
from tests.laws.grids import corners, some_long
from tests.support.numbers.host_kernels import TEXTS, host_compiler

KINDS = ["the GPU", *TEXTS]
SHARED = [Geometry(1, 2, 4), Geometry(8, 4, 1), Geometry(2, 8, 2)]
SHAPES = [(48, 264), (513, 72), (1024, 64)]
RANKS = {1: 4, 2: 16, 3: 11}
"""Of the versions in slots 1 to 3; those of slots 2 and 3 have gains where there are any."""


@pytest.fixture(scope="module", params=some_long(KINDS, *KINDS[:2]))
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecodeKernel:
    if request.param in TEXTS:
        return DecodeKernel(TEXTS[request.param], host_compiler(tmp_path_factory))
    device = own_device()
    if device is None:
        pytest.skip("There is no GPU.")
    return DecodeKernel(device)


def a_stack(shape: tuple[int, int], dtype: mx.Dtype, *, gains: bool, ranks: Mapping[int, int] = RANKS) -> SlotStack:
    out, width = shape
    mx.random.seed(out)
    stack = SlotStack(4, 0, shape, dtype)
    stack.reserve(4, max(ranks.values()))
    for slot, rank in ranks.items():
        a = mx.random.normal((rank, width)) * width**-0.5
        gain = mx.random.uniform(0.5, 1.5, (out,)).astype(dtype) if gains and slot > 1 else None
        stack.write(slot, a.astype(dtype), mx.random.normal((rank, out)).astype(dtype), gain)
    mx.eval(stack.arrays())
    return stack


def aimed(stack: SlotStack, slots: list[int]) -> None:
    if len(set(slots)) == 1:
        stack.select(slots[0])
    else:
        stack.aim_rows(frozenset(slots), mx.array(slots, dtype=mx.uint32))


def one_by_one(base: nn.Linear, stack: SlotStack, slots: list[int], x: mx.array) -> np.ndarray:
    """Each row by products of its own, in float64."""

    def wide(array: mx.array) -> np.ndarray:
        return np.array(array.astype(mx.float32), dtype=np.float64)

    a, b, weight, given = wide(stack.a), wide(stack.b)[..., : stack.out], wide(base.weight), wide(x)
    gain = np.ones((4, stack.out)) if stack.gain is None else wide(stack.gain)
    bias = wide(base.bias) if "bias" in base else 0.0
    added = np.stack([(a[slot] @ row) @ b[slot] for slot, row in zip(slots, given[:, 0], strict=True)])
    return (gain[slots] * (given[:, 0] @ weight.T + added) + bias)[:, None]


def assert_as_one_by_one(
    kernel: DecodeKernel, stack: SlotStack, base: nn.Linear, slots: list[int], dtype: mx.Dtype
) -> None:
    stack.kernel = kernel
    aimed(stack, slots)
    x = mx.random.normal((len(slots), 1, base.weight.shape[1])).astype(dtype)
    found, expected = AdaptedLinear(base, stack)(x), one_by_one(base, stack, slots, x)
    assert found.dtype == dtype and found.shape == expected.shape
    # The layer's own product is rounded before the kernel adds to it, and a GPU may multiply float32 in TF32.
    bound = 8 * max(mx.finfo(dtype).eps, 2**-11 if dtype == mx.float32 else 0.0) * np.max(np.abs(expected))
    assert np.max(np.abs(np.array(found.astype(mx.float32)) - expected)) <= bound


@pytest.mark.parametrize(
    ("shape", "dtype", "gains", "bias"),
    corners(SHAPES, [mx.float32, mx.bfloat16, mx.float16], [False, True], [False, True]),
    ids=str,
)
def test_rows_get_what_plain_products_give(
    kernel: DecodeKernel, shape: tuple[int, int], dtype: mx.Dtype, gains: bool, bias: bool
) -> None:
    base = nn.Linear(shape[1], shape[0], bias=bias)
    base.set_dtype(dtype)
    stack = a_stack(shape, dtype, gains=gains)
    for slots in ([0], [1], [2, 2, 2], [0, 3, 1, 2, 0], [3] * 16, [2, 0, 3] * 5, [1, 1, 2, 2, 1]):
        assert_as_one_by_one(kernel, stack, base, slots, dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_inputs_that_a_warp_reads_in_turns(kernel: DecodeKernel, dtype: mx.Dtype) -> None:
    base = nn.Linear(2056, 48, bias=False)
    base.set_dtype(dtype)
    assert_as_one_by_one(kernel, a_stack((48, 2056), dtype, gains=False), base, [3, 0, 3, 2, 2], dtype)


@pytest.mark.parametrize("kernel", KINDS, indirect=True)
@pytest.mark.parametrize("rank", [8, 24, 32, MOST_RANK])
def test_ranks_are_read_in_tiles(kernel: DecodeKernel, rank: int) -> None:
    base = nn.Linear(72, 48, bias=False)
    stack = a_stack((48, 72), mx.float32, gains=False, ranks={1: rank, 3: rank - 5})
    for slots in ([1, 0, 3, 1, 1], [3] * 9):
        assert_as_one_by_one(kernel, stack, base, slots, mx.float32)


@pytest.mark.parametrize("shared", some_long(SHARED, SHARED[0]), ids=str)
def test_however_a_launch_is_shared_out(kernel: DecodeKernel, shared: Geometry) -> None:
    made = DecodeKernel(kernel.device, kernel.compiler, shared)
    base = nn.Linear(264, 300, bias=False)
    base.set_dtype(mx.bfloat16)
    for slots in ([3, 0, 3, 2, 2], [2] * 9):
        assert_as_one_by_one(made, a_stack((300, 264), mx.bfloat16, gains=True), base, slots, mx.bfloat16)


@pytest.mark.parametrize("kernel", KINDS, indirect=True)
def test_a_row_of_four_inputs_is_left_to_plain_products(kernel: DecodeKernel) -> None:
    """Metal keeps so few numbers where no vector is read from."""
    base = nn.Linear(4, 48, bias=False)
    stack = a_stack((48, 4), mx.float32, gains=False)
    assert_as_one_by_one(kernel, stack, base, [1], mx.float32)
    assert_as_one_by_one(kernel, stack, base, [1, 2], mx.float32)


def test_a_row_does_not_depend_on_the_others(kernel: DecodeKernel) -> None:
    shape, slots = (513, 72), [2, 0, 3, 1, 1, 2, 2] * 6
    stack = a_stack(shape, mx.bfloat16, gains=True)
    x = mx.random.normal((len(slots), 1, shape[1])).astype(mx.bfloat16)
    y = mx.random.normal((len(slots), 1, shape[0])).astype(mx.bfloat16)
    (every,) = kernel(x, mx.array(slots, dtype=mx.uint32), [LowRank(y, stack.a, stack.b, stack.gain)])
    for row in (0, 1, 2, 3, 4, 41):
        one = mx.array([slots[row]], dtype=mx.uint32)
        (alone,) = kernel(x[row : row + 1], one, [LowRank(y[row : row + 1], stack.a, stack.b, stack.gain)])
        assert mx.array_equal(every[row], alone[0])


def test_what_it_is_not_written_for_goes_the_plain_way() -> None:
    kernel = DecodeKernel("cuda")
    one_token, two_tokens = mx.zeros((4, 1, 64)), mx.zeros((4, 2, 64))
    assert kernel.takes(one_token, (48, 64), 16, mx.float32)
    assert not kernel.takes(two_tokens, (48, 64), 16, mx.float32), "prompts are read by plain products"
    assert not kernel.takes(one_token, (48, 64), 136, mx.float32), "ranks beyond its shared memory"
    assert not kernel.takes(mx.zeros((4, 1, 66)), (48, 66), 16, mx.float32), "rows that are no multiple of 16 bytes"
    assert not kernel.takes(one_token.astype(mx.bfloat16), (48, 64), 16, mx.float32), "another dtype than the stack's"
