"""The product of choices sorted by expert, in blocks of one expert each, against a product for each choice."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from mlx_lm.utils import load_model

from adapters.resident.layers import expert_product as module
from adapters.resident.layers.expert_product import (
    BLOCKS,
    FEW,
    ExpertLinear,
    PackedExpertLinear,
    expert_product,
    in_blocks,
    use_expert_product,
)
from tests.support import tiny_models
from tests.support.numbers.bounds import TINY, assert_near, relative

IN, OUT = 24, 17


def chosen(counts: list[int]) -> mx.array:
    """Choices in order, so many of each expert."""
    return mx.array(np.repeat(np.arange(len(counts)), counts).astype(np.uint32))


def product(x: mx.array, stack: mx.array, experts: mx.array) -> np.ndarray:
    """float64, choice by choice."""
    rows, matrices = np.array(x, np.float64)[:, 0], np.array(stack, np.float64)
    return np.stack([row @ matrices[expert] for row, expert in zip(rows, np.array(experts), strict=True)])[:, None]


def made(experts: mx.array, number: int, *, turned: bool) -> tuple[mx.array, mx.array]:
    draw = np.random.default_rng(experts.size)
    x = mx.array(draw.normal(size=(experts.size, 1, IN)).astype(np.float32))
    shape = (number, OUT, IN) if turned else (number, IN, OUT)
    stack = mx.array(draw.normal(size=shape).astype(np.float32))
    return x, stack.swapaxes(-1, -2) if turned else stack


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize(
    "counts",
    [[1], [0, 1], [16, 32, 64], [15, 17, 1, 0], [0, 0, 130], [130, 0, 0], [3] * 40, [64, 1, 0, 200, 31]],
    ids=str,
)
def test_blocks_are_the_product_of_each_choice(rows: int, counts: list[int]) -> None:
    experts = chosen(counts)
    x, stack = made(experts, len(counts), turned=True)
    found = in_blocks(x, stack, experts, rows)
    assert found.shape == (sum(counts), 1, OUT)
    right = product(x, stack, experts)
    assert_near(found, right, relative(IN) * np.abs(right).max())


@pytest.mark.parametrize("each", [1, FEW, 2 * BLOCKS[0], 5 * BLOCKS[-1]])
def test_cuda_gets_no_sorted_product(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = chosen([each, each, each])
    x, stack = made(experts, 3, turned=True)
    asked, gather_mm = list[bool](), mx.gather_mm

    def noted(*args: mx.array, sorted_indices: bool = False, **options: mx.array) -> mx.array:
        asked.append(sorted_indices)
        return gather_mm(*args, sorted_indices=sorted_indices, **options)

    monkeypatch.setattr(mx, "gather_mm", noted)
    expected = product(x, stack, experts)
    for device in (None, "cuda"):
        monkeypatch.setattr(module, "own_device", lambda device=device: device)
        found = expert_product(x, stack, experts, in_order=True)
        assert asked.pop() is (device is None) and not asked
        assert_near(found, expected, relative(IN) * np.abs(expected).max())


def test_a_block_of_experts_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(0)
    block = SwitchGLU(IN, 32, 5, bias=True)
    x = mx.random.normal((2, 70, IN))
    choices = [each.astype(mx.uint32) for each in (mx.random.randint(0, 5, (2, 70, 2)), mx.full((2, 70, 2), 3))]
    packed = SwitchGLU(64, 32, 5)
    nn.quantize(packed, group_size=32, bits=4)
    wide = mx.random.normal((2, 70, 64))
    expected = [np.array(block(x, each)) for each in choices]
    unpacked = [np.array(packed(wide, each)) for each in choices]
    for each in (block, packed):
        use_expert_product(each)
    assert type(block.gate_proj) is ExpertLinear and type(packed.gate_proj) is PackedExpertLinear
    asked: list[bool] = []
    gather_qmm = mx.gather_qmm
    monkeypatch.setattr(mx, "gather_qmm", lambda *args, sorted_indices, **options: (
        asked.append(sorted_indices), gather_qmm(*args, sorted_indices=sorted_indices, **options))[1])  # fmt: skip
    for device in (None, "cuda"):
        monkeypatch.setattr(module, "own_device", lambda device=device: device)
        for each, right, right_packed in zip(choices, expected, unpacked, strict=True):
            # Up and gate, which are multiplied with each other, and down.
            assert_near(block(x, each), right, relative(2 * IN + 32) * np.abs(right).max())
            assert_near(packed(wide, each), right_packed, relative(2 * 64 + 32) * np.abs(right_packed).max())
    assert asked == [True] * 6 + [False] * 6


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_a_model_computes_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(tiny_models.build(family, tmp_path))
    tokens = mx.array(np.random.default_rng(0).integers(0, 280, (3, 40)))
    expected = np.array(model(tokens))
    use_expert_product(model)
    assert not any(type(layer) is SwitchLinear for _, layer in model.named_modules())
    monkeypatch.setattr(module, "own_device", lambda: "cuda")
    blocks, own = list[int](), module.in_blocks
    monkeypatch.setattr(module, "in_blocks", lambda *args: (blocks.append(1), own(*args))[1])
    assert_near(np.array(model(tokens)), expected, TINY.of_logits(expected, 40))
    assert blocks
