"""LLaVA's vision half (arXiv:2304.08485): CLIP's hidden states of chosen layers through two linear layers. With
Pixtral's tower it is `rollout_server.models.vision.pixtral`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.vision.family import Features, Grid
from rollout_server.models.vision.vit import ClipTower, side

STRATEGIES = {"default": 1, "full": 0}
"""How many states in front stand for no patch and are left out."""


def llava(config: Mapping[str, Any]) -> LlavaVision:
    """From config.json as transformers settles it."""
    fields, strategy = config["vision_config"], config["vision_feature_select_strategy"]
    patches = side(fields)
    return LlavaVision(LlavaTower(config), config["image_token_id"], patches, patches**2 + 1 - STRATEGIES[strategy])


def layers_of(config: Mapping[str, Any]) -> list[int]:
    """Which hidden states are read, one behind the other."""
    chosen = config["vision_feature_layer"]
    return [chosen] if isinstance(chosen, int) else list(chosen)


class Projector(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["vision_config"]["hidden_size"] * len(layers_of(config))
        hidden, bias = config["text_config"]["hidden_size"], config["multimodal_projector_bias"]
        self._activation = ACTIVATIONS[config["projector_hidden_act"]]
        self.linear_1 = nn.Linear(width, hidden, bias=bias)
        self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(self._activation(self.linear_1(x)))


class LlavaTower(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._layers = layers_of(config)
        self._left_out = STRATEGIES[config["vision_feature_select_strategy"]]
        self.vision_tower = ClipTower(config["vision_config"])
        self.multi_modal_projector = Projector(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        states = self.vision_tower.states(pixels[None])
        chosen = mx.concatenate([states[layer][0, self._left_out :] for layer in self._layers], axis=-1)
        return self.multi_modal_projector(chosen)


@dataclass(frozen=True, slots=True, eq=False)
class LlavaVision:
    tower: LlavaTower
    placeholder: int
    side: int
    """Patches along each side of the square that every picture is made to."""
    count: int
    """Tokens of a picture."""

    sees_both_ways = False
    axes = None

    def tokens(self, grid: Grid) -> int:
        if grid != (self.side, self.side):
            raise ValueError(f"a picture has {self.side} rows and columns of patches, not {grid}")
        return self.count

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        return Features(self.tower(pixels))

    def positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> None:
        return None
