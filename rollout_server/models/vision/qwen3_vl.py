"""Qwen3-VL's tower: learned positions that are resampled to a picture's grid, and features of several depths, which the
decoder adds behind its first layers (DeepStack, arXiv:2406.04334)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rollout_server.models.encoders.activations import ACTIVATIONS
from rollout_server.models.vision.family import Features, Grid
from rollout_server.models.vision.qwen import (
    EPS,
    PatchEmbedding,
    PlainFeed,
    QwenVision,
    TowerAttention,
    TowerLayer,
    Turn,
    patch_values,
    places_of,
    rope_axes,
    still,
)

FEED = ("linear_fc1", "linear_fc2")


def qwen3_vl(config: Mapping[str, Any]) -> QwenVision:
    """From config.json as transformers settles it."""
    fields = config["vision_config"]
    axes = rope_axes(config["text_config"], interleaved=True)
    return QwenVision(Qwen3Tower(fields), config["image_token_id"], axes, fields["spatial_merge_size"])


class Merger(nn.Module):
    """merge · merge patches that stand one behind the other become one token; the norm is taken over one patch, or over
    all that are merged."""

    def __init__(self, fields: Mapping[str, Any], *, over_all: bool) -> None:
        super().__init__()
        self._inner = fields["hidden_size"] * fields["spatial_merge_size"] ** 2
        self._over_all = over_all
        self._activation = ACTIVATIONS["gelu"]
        self.norm = nn.LayerNorm(self._inner if over_all else fields["hidden_size"], eps=EPS)
        self.linear_fc1 = nn.Linear(self._inner, self._inner)
        self.linear_fc2 = nn.Linear(self._inner, fields["out_hidden_size"])

    def __call__(self, x: mx.array) -> mx.array:
        merged = self.norm(x.reshape(-1, self._inner)) if self._over_all else self.norm(x).reshape(-1, self._inner)
        return self.linear_fc2(self._activation(self.linear_fc1(merged)))


class Qwen3Tower(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads, self._merge = fields["hidden_size"], fields["num_heads"], fields["spatial_merge_size"]
        self._head_width, self._theta = width // heads, float(fields["rope_parameters"]["rope_theta"])
        self._side = int(fields["num_position_embeddings"] ** 0.5)
        self._deep = {layer: at for at, layer in enumerate(fields["deepstack_visual_indexes"])}
        activation, norm = ACTIVATIONS[fields["hidden_act"]], partial(nn.LayerNorm, width, eps=EPS)
        self.patch_embed = PatchEmbedding(patch_values(fields), width, bias=True)
        self.pos_embed = nn.Embedding(fields["num_position_embeddings"], width)
        self.blocks = [
            TowerLayer(
                norm,
                TowerAttention(width, heads),
                PlainFeed(width, fields["intermediate_size"], activation, FEED),
            )
            for _ in range(fields["depth"])
        ]
        self.merger = Merger(fields, over_all=False)
        self.deepstack_merger_list = [Merger(fields, over_all=True) for _ in self._deep]

    def __call__(self, pixels: mx.array, grid: Grid) -> Features:
        places = places_of(grid, self._merge)
        x = (self.patch_embed(pixels) + self._positions(places, grid))[None]
        turn = Turn.of(places, self._head_width, self._theta)
        deep: dict[int, mx.array] = {}
        for number, block in enumerate(self.blocks):
            x = block(x, turn)
            if number in self._deep:
                deep[self._deep[number]] = self.deepstack_merger_list[self._deep[number]](x)
        return Features(self.merger(x), tuple(deep[at] for at in sorted(deep)))

    def _positions(self, places: np.ndarray, grid: Grid) -> mx.array:
        """[N, width]: a mean of the four learned positions around each patch, whose grid is laid over the picture
        corner to corner."""
        sides = np.array(still(grid, self._merge)[1:])
        at = places.astype(np.float32) * np.float32(self._side - 1) / np.maximum(sides - 1, 1).astype(np.float32)
        low = np.floor(at).astype(np.int64)
        part = at - low
        total = mx.array(0.0)
        for down in (0, 1):
            for right in (0, 1):
                row, column = (np.minimum(low + np.array([down, right]), self._side - 1)).T
                weight = np.abs(1 - down - part[:, 0]) * np.abs(1 - right - part[:, 1])
                learned = self.pos_embed(mx.array(row * self._side + column))
                total = total + learned * mx.array(weight.astype(np.float32))[:, None]
        return total.astype(self.pos_embed.weight.dtype)
