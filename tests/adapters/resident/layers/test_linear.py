"""Layers that read the same input share a launch of the kernel, and get what each gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.kernels.decode import DecodeKernel
from adapters.kernels.text import own_device
from adapters.resident.layers.linear import AdaptedLinear, SharedInput
from adapters.resident.layers.slot_stack import ONE, SlotStack
from tests.laws.grids import corners, some_long
from tests.support.numbers.bounds import assert_near, relative
from tests.support.numbers.host_kernels import TEXTS, host_compiler

KINDS = ["the GPU", *TEXTS]

WIDTH = 64
OUTS = {"query": 1032, "key": 72, "value": 520}
RANKS = {"query": 16, "key": 16, "value": 8}


class Counted(DecodeKernel):
    """Notes how many layers each launch computes."""

    launches: list[int]

    def __call__(self, x: mx.array, rows: mx.array, layers: Sequence[Any]) -> list[mx.array]:
        self.launches.append(len(layers))
        return super().__call__(x, rows, layers)


@pytest.fixture(params=some_long(KINDS, *KINDS[:2]))
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    if request.param in TEXTS:
        found = Counted(TEXTS[request.param], host_compiler(tmp_path_factory))
    else:
        device = own_device()
        if device is None:
            pytest.skip("There is no GPU.")
        found = Counted(device)
    found.launches = []
    return found


class Block(nn.Module):
    """Three layers with versions in slots 1 and 2, each of them beside the others or alone."""

    def __init__(self, kernel: DecodeKernel, dtype: mx.Dtype, *, gains: bool, together: bool) -> None:
        super().__init__()
        mx.random.seed(7)
        self._shared = shared = SharedInput() if together else None
        for name, out in OUTS.items():
            base = nn.Linear(WIDTH, out, bias=name == "value" or gains)
            base.set_dtype(dtype)
            stack = SlotStack(3, 0, (out, WIDTH), dtype, kernel)
            stack.reserve(3, RANKS[name])
            for slot in (1, 2):
                a, b = mx.random.normal((RANKS[name], WIDTH)), mx.random.normal((RANKS[name], out))
                gain = mx.random.uniform(0.5, 1.5, (out,)).astype(dtype) if gains and slot == 2 else None
                stack.write(slot, a.astype(dtype), b.astype(dtype), gain)
            mx.eval(stack.arrays())
            self[name] = AdaptedLinear(base, stack, shared)

    def forget(self) -> None:
        if self._shared is not None:
            self._shared.forget()

    def aim(self, slots: list[int]) -> None:
        rows = mx.array(slots if len(set(slots)) > 1 else slots[:1], dtype=mx.uint32)
        for name in OUTS:
            if len(set(slots)) == 1:
                self[name].stack.select(slots[0], rows)
            else:
                self[name].stack.aim_rows(frozenset(slots), rows)


def of_all(block: Block, x: mx.array) -> list[mx.array]:
    return [block[name](x) for name in OUTS]


@pytest.mark.parametrize(("dtype", "gains"), corners([mx.float32, mx.bfloat16], [False, True]), ids=str)
def test_what_each_gets_alone(kernel: Counted, dtype: mx.Dtype, gains: bool) -> None:
    together, alone = (Block(kernel, dtype, gains=gains, together=each) for each in (True, False))
    for slots in ([1, 1, 1], [2], [2, 0, 1, 1, 2], [1, 2] * 9):
        x = mx.random.normal((len(slots), 1, WIDTH)).astype(dtype)
        kernel.launches.clear()
        together.aim(slots)
        found = of_all(together, x)
        assert kernel.launches == [3]
        alone.aim(slots)
        for one, other in zip(found, of_all(alone, x), strict=True):
            assert mx.array_equal(one, other), "the tiles that ranks are read in add up in one order"
        assert kernel.launches == [3, 1, 1, 1]


def test_the_bare_base_needs_no_launch(kernel: Counted) -> None:
    block = Block(kernel, mx.float32, gains=False, together=True)
    block.aim([0, 0])
    of_all(block, mx.ones((2, 1, WIDTH)))
    assert kernel.launches == []


def test_prompts_are_read_by_each_alone(kernel: Counted) -> None:
    block = Block(kernel, mx.float32, gains=False, together=True)
    block.aim([1, 2])
    of_all(block, mx.ones((2, 3, WIDTH)))
    assert kernel.launches == []


@pytest.mark.parametrize("kernel", KINDS, indirect=True)
@pytest.mark.parametrize("calls", ["other arrays", "one of them only"])
def test_a_block_that_gives_them_different_arrays_is_left_alone(kernel: Counted, calls: str) -> None:
    together, alone = (Block(kernel, mx.float32, gains=False, together=each) for each in (True, False))

    def forward(block: Block, x: mx.array) -> list[mx.array]:
        return [block["query"](x)] if calls == "one of them only" else [block[name](x + 0) for name in OUTS]

    for _ in range(3):
        x = mx.random.normal((4, 1, WIDTH))
        together.aim([1, 2, 2, 0])
        alone.aim([1, 2, 2, 0])
        for one, other in zip(forward(together, x), forward(alone, x), strict=True):
            assert mx.array_equal(one, other)
    assert kernel.launches.count(3) == 1, "once it was in vain"


def test_a_forward_that_broke_off_takes_no_later_one_apart(kernel: Counted) -> None:
    together, alone = (Block(kernel, mx.float32, gains=False, together=each) for each in (True, False))
    for block in (together, alone):
        block.aim([1, 2, 2, 0])
    together["query"](mx.random.normal((4, 1, WIDTH)))
    together.forget()
    kernel.launches.clear()
    x = mx.random.normal((4, 1, WIDTH))
    found = of_all(together, x)
    assert kernel.launches == [3]
    for one, other in zip(found, of_all(alone, x), strict=True):
        assert mx.array_equal(one, other)


def test_a_trace_reads_the_slot_that_it_is_given(kernel: Counted) -> None:
    """Also where a layer goes by plain products within it, as one whose rank the kernel does not take."""
    block = Block(kernel, mx.float32, gains=True, together=True)
    stacks = [block[name].stack for name in OUTS]
    for stack in stacks:
        stack.kernel = Refusing()

    def step(x: mx.array, rows: mx.array, arrays: list[mx.array]) -> list[mx.array]:
        left, found = list(arrays), []
        for name, stack in zip(OUTS, stacks, strict=True):
            with stack.reading(left, rows):
                found.append(block[name](x))
        return found

    traced: Callable[..., list[mx.array]] = mx.compile(step)
    x = mx.random.normal((2, 1, WIDTH))
    for slot in (2, 1, 2):
        # Both slots are said to have gains, so that the same fields are lent and nothing is traced anew.
        for stack in stacks:
            stack.gained = {1, 2}
        block.aim([slot, slot])
        plain = of_all(block, x)
        found = traced(x, mx.array([ONE], dtype=mx.uint32), [array for stack in stacks for array in stack.lent()[1]])
        for one, other in zip(found, plain, strict=True):
            # The layer's own product, and one of the rank behind one of the width.
            assert_near(one, other, relative(2 * WIDTH + max(RANKS.values())) * float(mx.max(mx.abs(other))))


def test_views_of_a_slot_are_made_once_and_dropped_before_a_write() -> None:
    stack = SlotStack(3, 0, (OUTS["key"], WIDTH), mx.float32, Refusing())
    stack.reserve(3, 8)
    stack.write(2, mx.ones((8, WIDTH)), mx.ones((8, OUTS["key"])), None)
    stack.select(2)
    first, again = stack.lent()[1], stack.lent()[1]
    assert all(one is other for one, other in zip(first, again, strict=True))
    stack.rest()
    stack.write(2, 2 * mx.ones((8, WIDTH)), mx.ones((8, OUTS["key"])), None)
    stack.select(2)
    assert float(stack.lent()[1][0][ONE].max()) == 2.0


class Refusing(DecodeKernel):
    def __init__(self) -> None:
        super().__init__("cuda")

    def takes(self, x: mx.array, shape: tuple[int, int], rank: int, dtype: mx.Dtype) -> bool:
        return False
