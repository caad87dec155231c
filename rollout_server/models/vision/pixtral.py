"""Pixtral's tower (arXiv:2410.07073), which takes pictures as they are shaped: in Mistral 3, whose projector merges
patches, and in Pixtral itself, which transformers has as LLaVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.encoders.attention import attend_in_parts, split_heads
from rollout_server.models.vision.family import Features, Grid
from rollout_server.models.vision.llava import Projector, layers_of
from rollout_server.models.vision.qwen import Turn
from rollout_server.models.vision.vit import Patches

EPS = 1e-5
"""Every norm of the tower has it, whatever the configuration says."""


def pixtral(config: Mapping[str, Any]) -> PixtralVision:
    """LLaVA with this tower, from config.json as transformers settles it. Raises `ValueError` for a choice of states
    that leaves out the first patch."""
    strategy = config["vision_feature_select_strategy"]
    if strategy != "full":
        raise ValueError(f"vision_feature_select_strategy is {strategy}, which leaves out a patch of a pixtral tower")
    return PixtralVision(PixtralModel(config, Projector(config)), config["image_token_id"], 1)


def mistral3(config: Mapping[str, Any]) -> PixtralVision:
    """From config.json as transformers settles it."""
    model = PixtralModel(config, MergingProjector(config))
    return PixtralVision(model, config["image_token_id"], config["spatial_merge_size"])


def turn_of(rows: int, columns: int, width: int, theta: float) -> Turn:
    """Every other frequency turns by the row, and those between by the column."""
    frequencies = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    places = np.indices((rows, columns)).reshape(2, -1, 1).astype(np.float32)
    angles = np.concatenate([places[0] * frequencies[0::2], places[1] * frequencies[1::2]], axis=-1)
    whole = mx.array(np.concatenate([angles, angles], axis=-1).astype(np.float32))
    return Turn(mx.cos(whole), mx.sin(whole))


class Attention(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, self._heads = fields["hidden_size"], fields["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def __call__(self, x: mx.array, turn: Turn) -> mx.array:
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend_in_parts(turn(q), turn(k), v))


class Feed(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = fields["hidden_size"], fields["intermediate_size"]
        self._activation = ACTIVATIONS[fields["hidden_act"]]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(fields)
        self.feed_forward = Feed(fields)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(fields["hidden_size"], eps=EPS) for _ in range(2))

    def __call__(self, x: mx.array, turn: Turn) -> mx.array:
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.feed_forward(self.ffn_norm(x))


class Layers(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = [Layer(fields) for _ in range(fields["num_hidden_layers"])]


class PixtralTower(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        self._head_width, self._theta = width, float(fields["rope_parameters"]["rope_theta"])
        self.patch_conv = Patches(fields, bias=False)
        self.ln_pre = nn.RMSNorm(fields["hidden_size"], eps=EPS)
        self.transformer = Layers(fields)

    def states(self, pixels: mx.array, grid: Grid) -> list[mx.array]:
        """Hidden states [patches, width], before the first layer and behind each."""
        turn = turn_of(grid[0], grid[1], self._head_width, self._theta)
        found = [self.ln_pre(self.patch_conv(pixels[None]))]
        for layer in self.transformer.layers:
            found.append(layer(found[-1], turn))
        return [states[0] for states in found]


class PatchMerger(nn.Module):
    def __init__(self, width: int, merge: int) -> None:
        super().__init__()
        self._merge = merge
        self.merging_layer = nn.Linear(width * merge**2, width, bias=False)

    def __call__(self, x: mx.array, grid: Grid) -> mx.array:
        """Squares of merge · merge patches, value by value, as torch unfolds them; what is left over is not seen."""
        merge = self._merge
        down, across = grid[0] // merge, grid[1] // merge
        whole = x.reshape(*grid, -1)[: down * merge, : across * merge].reshape(down, merge, across, merge, -1)
        return self.merging_layer(whole.transpose(0, 2, 4, 1, 3).reshape(down * across, -1))


class MergingProjector(Projector):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        width = config["vision_config"]["hidden_size"]
        self.norm = nn.RMSNorm(width, eps=config["text_config"]["rms_norm_eps"])
        self.patch_merger = PatchMerger(width, config["spatial_merge_size"])

    def __call__(self, x: mx.array, grid: Grid) -> mx.array:  # type: ignore[override]
        return super().__call__(self.patch_merger(self.norm(x), grid))


class PixtralModel(nn.Module):
    def __init__(self, config: Mapping[str, Any], projector: Projector) -> None:
        super().__init__()
        self._layers = layers_of(config)
        self.vision_tower = PixtralTower(config["vision_config"])
        self.multi_modal_projector = projector

    def __call__(self, pixels: mx.array, grid: Grid) -> mx.array:
        states = self.vision_tower.states(pixels, grid)
        chosen = mx.concatenate([states[layer] for layer in self._layers], axis=-1)
        if isinstance(self.multi_modal_projector, MergingProjector):
            return self.multi_modal_projector(chosen, grid)
        return self.multi_modal_projector(chosen)


@dataclass(frozen=True, slots=True, eq=False)
class PixtralVision:
    tower: PixtralModel
    placeholder: int
    merge: int
    """Patches along each side of a square that becomes one token."""

    sees_both_ways = False
    axes = None

    def tokens(self, grid: Grid) -> int:
        if len(grid) != 2 or min(grid) < self.merge:
            raise ValueError(f"a picture has at least {self.merge} rows and columns of patches, not {grid}")
        return (grid[0] // self.merge) * (grid[1] // self.merge)

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        return Features(self.tower(pixels, grid))

    def positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> None:
        return None
