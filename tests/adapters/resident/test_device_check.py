"""Which outputs of a very wide layer are compared with numpy at load, and that a fault in a part of them is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from adapters.resident import device_check
from adapters.resident.device_check import COMPARED, TILE, check_adapters, compared_outputs
from adapters.resident.layers import expert_product, slot_stack
from adapters.resident.layers.expert_product import use_expert_product
from adapters.resident.model_layers import adaptable_layers
from tests.laws.grids import some_long

WIDE = 151_936


@pytest.mark.parametrize("count", [1, 7, 1000, COMPARED])
def test_of_few_outputs_all_are_compared(count: int) -> None:
    assert compared_outputs(count).tolist() == list(range(count))


@pytest.mark.parametrize("count", [COMPARED + 1, 32_003, WIDE])
def test_of_many_both_ends_and_borders_are(count: int) -> None:
    found = compared_outputs(count)
    assert (np.diff(found) > 0).all() and found[0] == 0 and found[-1] == count - 1
    assert len(found) < COMPARED // 2
    assert set(range(TILE // 2)) | set(range(count - TILE // 2, count)) <= set(found.tolist())
    pairs = [at for at in found.tolist() if at % TILE == 0 and at - 1 in found]
    assert len(pairs) >= min(200, count // TILE - 1)
    assert np.array_equal(found, compared_outputs(count)), "the same at every start"


def spoilt(product: Callable[..., mx.array], begin: int, end: int) -> Callable[..., mx.array]:
    """A gathered product whose outputs of a very wide layer are wrong from `begin` to `end`."""

    def wrong(x: mx.array, matrices: mx.array, **options: mx.array) -> mx.array:
        found = product(x, matrices, **options)
        at = mx.arange(found.shape[-1])
        return mx.where((at >= begin) & (at < end), -found, found) if len(at) > COMPARED else found

    return wrong


@pytest.mark.parametrize(
    "wide, begin, end",
    some_long([(9000, 0, 8), (WIDE, 0, 8), (WIDE, WIDE - 16, WIDE), (WIDE, 70_000, 72_000)], (9000, 0, 8)),
)
def test_a_part_that_is_wrong_is_found(wide: int, begin: int, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(8, wide, bias=False))
    layers = adaptable_layers(module)
    assert check_adapters(module, layers, mx.float32) == {}
    monkeypatch.setattr(slot_stack.mx, "gather_mm", spoilt(mx.gather_mm, begin, end))
    assert f"layers.0 ({wide} × 8, float32)" in check_adapters(module, layers, mx.float32)["linear"]


def test_the_product_of_choices_in_blocks_is_compared_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of every size, however many experts there are: many tokens would need as many choices for the largest."""
    module = nn.Sequential(SwitchGLU(16, 24, 12))
    use_expert_product(module)
    layers = adaptable_layers(module)
    for part in (device_check, expert_product):
        monkeypatch.setattr(part, "own_device", lambda: "cuda")
    assert check_adapters(module, layers, mx.float32) == {}
    for wrong in expert_product.BLOCKS:
        right = expert_product.in_blocks
        spoilt = partial(_spoilt_blocks, right, wrong)
        monkeypatch.setattr(device_check, "in_blocks", spoilt)
        assert f"blocks of {wrong} " in check_adapters(module, layers, mx.float32)["experts"]
    monkeypatch.setattr(device_check, "own_device", lambda: None)
    assert check_adapters(module, layers, mx.float32) == {}, "it is not used there"


def _spoilt_blocks(
    right: Callable[..., mx.array], wrong: int, x: mx.array, stack: mx.array, experts: mx.array, rows: int
) -> mx.array:
    found = right(x, stack, experts, rows)
    return found[::-1] if rows == wrong else found
