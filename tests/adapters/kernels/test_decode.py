"""The kernel for adapters in decode steps against plain products, wherever there is a device that it is written for."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.kernels.decode import MANY_ROWS, DecodeKernel, decode_kernel
from adapters.resident.layers import AdaptedLinear, SlotStack

SHAPES = [(48, 64), (513, 72), (1024, 1032)]
RANKS = {1: 4, 2: 16, 3: 11}
"""Of the versions in slots 1 to 3; those of slots 2 and 3 have gains where there are any."""


@pytest.fixture(scope="module")
def kernel() -> DecodeKernel:
    found = decode_kernel()
    if found is None:
        pytest.skip("no kernel is written for a CPU")
    return found


def a_stack(shape: tuple[int, int], dtype: mx.Dtype, *, gains: bool) -> SlotStack:
    out, width = shape
    mx.random.seed(out)
    stack = SlotStack(4, 0, shape, dtype)
    stack.reserve(4, max(RANKS.values()))
    for slot, rank in RANKS.items():
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


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("gains", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_get_what_plain_products_give(
    kernel: DecodeKernel, shape: tuple[int, int], dtype: mx.Dtype, gains: bool, bias: bool
) -> None:
    base = nn.Linear(shape[1], shape[0], bias=bias)
    base.set_dtype(dtype)
    stack = a_stack(shape, dtype, gains=gains)
    layer = AdaptedLinear(base, stack)
    for slots in ([1], [2, 2, 2], [0, 3, 1, 2, 0], [3] * MANY_ROWS, [2, 0, 3] * MANY_ROWS):
        x = mx.random.normal((len(slots), 1, shape[1])).astype(dtype)
        stack.kernel = None
        aimed(stack, slots)
        expected = layer(x).astype(mx.float32)
        stack.kernel = kernel
        aimed(stack, slots)
        found = layer(x)
        assert found.dtype == dtype and found.shape == expected.shape
        # Plain products round after each of four operations, and a GPU may multiply float32 in TF32.
        bound = 8 * max(mx.finfo(dtype).eps, 2**-11 if dtype == mx.float32 else 0.0) * float(mx.max(mx.abs(expected)))
        assert float(mx.max(mx.abs(found.astype(mx.float32) - expected))) <= bound


def test_a_row_does_not_depend_on_the_others(kernel: DecodeKernel) -> None:
    shape, slots = (513, 72), [2, 0, 3, 1] * MANY_ROWS
    stack = a_stack(shape, mx.bfloat16, gains=True)
    x = mx.random.normal((len(slots), 1, shape[1])).astype(mx.bfloat16)
    y = mx.random.normal((len(slots), 1, shape[0])).astype(mx.bfloat16)
    every = kernel(x, y, stack.a, stack.b, mx.array(slots, dtype=mx.uint32), stack.gain)
    for row in (0, 1, 2, 3, 255):
        one = mx.array([slots[row]], dtype=mx.uint32)
        alone = kernel(x[row : row + 1], y[row : row + 1], stack.a, stack.b, one, stack.gain)
        # Few rows are read by several warps each, whose sums are added in another order.
        gap = mx.max(mx.abs(every[row].astype(mx.float32) - alone[0].astype(mx.float32)))
        assert float(gap) <= mx.finfo(mx.bfloat16).eps * float(mx.max(mx.abs(every[row].astype(mx.float32))))


def test_what_it_is_not_written_for_goes_the_plain_way() -> None:
    kernel = DecodeKernel("cuda")
    one_token, two_tokens = mx.zeros((4, 1, 64)), mx.zeros((4, 2, 64))
    assert kernel.takes(one_token, 64, 16, mx.float32)
    assert not kernel.takes(two_tokens, 64, 16, mx.float32), "prompts are read by plain products"
    assert not kernel.takes(one_token, 64, 136, mx.float32), "ranks beyond its shared memory"
    assert not kernel.takes(mx.zeros((4, 1, 66)), 66, 16, mx.float32), "rows that are no multiple of 16 bytes"
    assert not kernel.takes(one_token.astype(mx.bfloat16), 64, 16, mx.float32), "another dtype than the stack's"
