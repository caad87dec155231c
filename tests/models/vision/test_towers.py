"""Towers without a checkpoint: windows against a mask over the whole picture, grids and positions at their edges, and
what a checkpoint may call its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from rollout_server.models.encoders.attention import attend, split_heads
from rollout_server.models.vision.families import KINDS, PIXTRAL, kind_of
from rollout_server.models.vision.family import Grid, VisionFamily
from rollout_server.models.vision.qwen import Turn, places_of, positions_of
from rollout_server.models.vision.qwen2_vl import Qwen25Tower, Windows
from tests.support.golden_vision import FAMILIES, config_of
from tests.support.numbers.bounds import Network, assert_near

GRIDS: tuple[Grid, ...] = ((1, 2, 2), (1, 4, 4), (1, 6, 8), (1, 10, 4), (1, 2, 14))
WINDOW = 4


def arrays_of(family: VisionFamily) -> dict[str, mx.array]:
    flat: list[tuple[str, mx.array]] = tree_flatten(family.tower.parameters())  # type: ignore[assignment]
    return dict(flat)


def made(name: str, seed: int = 5) -> tuple[VisionFamily, Mapping[str, Any]]:
    config = config_of(name)
    kind = kind_of(config)
    assert kind is not None
    mx.random.seed(seed)
    return kind.make(config), config


def by_mask(tower: Any, pixels: mx.array, grid: Grid) -> mx.array:
    """The obvious way: patches stay where they are, and a mask says who stands in whose window."""
    places = places_of(grid, 2)
    window = places // WINDOW
    same = mx.array((window[:, None] == window[None]).all(-1))[None, None]
    turn = Turn.of(places, 16, 10_000.0)
    x = tower.patch_embed(pixels)[None]
    for number, block in enumerate(tower.blocks):
        normed = block.norm1(x)
        q, k, v = (split_heads(part, 2) for part in mx.split(block.attn.qkv(normed), 3, axis=-1))
        mask = None if number in tower._whole else same
        x = x + block.attn.proj(attend(turn(q), turn(k), v, mask))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_side_by_side_are_a_mask_over_the_picture(grid: Grid) -> None:
    family, _ = made("qwen2_5_vl")
    assert isinstance(family.tower, Qwen25Tower)
    pixels = mx.random.normal((grid[1] * grid[2], 96))
    ours = np.array(family.features(pixels, grid).embeddings)
    wanted = np.array(by_mask(family.tower, pixels, grid))
    assert_near(ours, wanted, Network(3, 128, 32).of_logits(wanted, grid[1] * grid[2]), str(grid))


@pytest.mark.parametrize("grid", GRIDS)
def test_each_patch_stands_in_one_window(grid: Grid) -> None:
    windows = Windows.of(grid, 2, 2)
    assert sorted(windows.order[windows.real].tolist()) == list(range(grid[1] * grid[2]))
    blocks = windows.order.reshape(-1, 4)[windows.back(2)]
    assert (blocks == np.arange(grid[1] * grid[2]).reshape(-1, 4)).all()
    square = places_of(grid, 2)[windows.order] // WINDOW
    assert all(len(np.unique(at[real], axis=0)) == 1 for at, real in zip(square, windows.real, strict=True))


@pytest.mark.parametrize(("grid", "wrong"), [((1, 6, 7), "multiples"), ((2, 4, 4), "one frame"), ((4, 4), "one frame")])
def test_a_grid_that_no_picture_has_is_refused(grid: Grid, wrong: str) -> None:
    family, _ = made("qwen2_vl")
    with pytest.raises(ValueError, match=wrong):
        family.tokens(grid)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"}))
def test_a_grid_of_another_family_is_refused(name: str) -> None:
    family, _ = made(name)
    with pytest.raises(ValueError, match="a picture has"):
        family.tokens((1, 0))


def test_positions_go_on_behind_the_longer_side_of_a_picture() -> None:
    found = positions_of([1, 1, 9, 9, 9, 9, 9, 9, 2], [(1, 4, 6)], 9, 2)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert (positions_of(range(5), [], 9, 2) == np.arange(5)).all()


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([9, 9, 9], [(1, 4, 4)]),
        ([9, 9, 1, 9, 9], [(1, 4, 4)]),
        ([9] * 5, [(1, 4, 4)]),
        ([9] * 4, []),
        ([1, 2], [(1, 4, 4)]),
        ([9] * 8, [(1, 4, 4)]),
    ],
)
def test_placeholders_and_grids_have_to_agree(ids: list[int], grids: list[Grid]) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        positions_of(ids, grids, 9, 2)


def checkpoint_names(name: str, arrays: Mapping[str, mx.array], way: str) -> dict[str, mx.array]:
    """As published, as transformers 5 may write, or as mlx-vlm writes a tower."""
    qwen = name.startswith("qwen")
    tiled = name in ("idefics3", "smolvlm")
    prefix = {"plain": "visual." if qwen else "", "nested": "model.visual." if qwen else "model."}
    found = {}
    for own, value in arrays.items():
        key = prefix.get(way, "vision_tower." if qwen else "") + own
        if way == "wrapped" and own.startswith("vision_tower.") and not tiled:
            key = own.replace("vision_tower.", "vision_tower.vision_model.", 1)
        kernel = "patch_embed.proj.weight" in own or "patch_embedding.weight" in own or "patch_conv.weight" in own
        if kernel:
            size = int((value.shape[1] // (6 if qwen else 3)) ** 0.5)
            value = value.reshape(len(value), 3, *([2] if qwen else []), size, size)
            value = mx.moveaxis(value, 1, -1) if way == "wrapped" else value
        found[key] = value
    return found


@pytest.mark.parametrize("way", ["plain", "nested", "wrapped"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_may_call_its_tensors_in_several_ways(name: str, way: str) -> None:
    """`wrapped` has CLIP and SigLIP inside of `vision_model`, and the channels of kernels last, as mlx-vlm has."""
    family, config = made(name)
    kind, arrays = kind_of(config), arrays_of(family)
    assert kind is not None
    given = checkpoint_names(name, arrays, way) | {"language_model.lm_head.weight": mx.zeros(1)}
    found = kind.named(given, family)
    assert found.keys() == arrays.keys()
    assert all(mx.array_equal(found[key], arrays[key]) for key in arrays)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tensor_of_the_tower_that_is_not_known_is_not_dropped(name: str) -> None:
    family, config = made(name)
    kind = kind_of(config)
    assert kind is not None
    strange = {f"{kind.parts[0]}strange.weight": mx.zeros(1)}
    found = kind.named(checkpoint_names(name, arrays_of(family), "plain") | strange, family)
    with pytest.raises(ValueError, match="strange"):
        family.tower.load_weights(list(found.items()), strict=True)


def test_a_model_is_known_by_its_type_and_its_tower() -> None:
    assert kind_of({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}) is PIXTRAL
    assert kind_of({"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}) is KINDS["llava"]
    assert kind_of({"model_type": "gemma3"}) is None
    assert kind_of({"model_type": "kimi_vl", "vision_config": {}}) is None
