"""The towers of Qwen2-VL (arXiv:2409.12191), whose layers see a whole picture, and of Qwen2.5-VL (arXiv:2502.13923),
most of whose layers see windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


def qwen2_vl(config: Mapping[str, Any]) -> QwenVision:
    """From config.json as transformers settles it."""
    fields = config["vision_config"]
    return _vision(config, Qwen2Tower(fields), fields["spatial_merge_size"])


def qwen2_5_vl(config: Mapping[str, Any]) -> QwenVision:
    """From config.json as transformers settles it."""
    fields = config["vision_config"]
    return _vision(config, Qwen25Tower(fields), fields["spatial_merge_size"])


def _vision(config: Mapping[str, Any], tower: nn.Module, merge: int) -> QwenVision:
    axes = rope_axes(config["text_config"], interleaved=False)
    return QwenVision(tower, config["image_token_id"], axes, merge)


class Merger(nn.Module):
    """merge · merge patches that stand one behind the other become one token of the decoder."""

    def __init__(self, norm: nn.Module, width: int, merge: int, out: int) -> None:
        super().__init__()
        self._inner = width * merge**2
        self._activation = ACTIVATIONS["gelu"]
        self.ln_q = norm
        # The activation stands between, as in torch's Sequential, and has no parameters.
        self.mlp: list[Any] = [nn.Linear(self._inner, self._inner), {}, nn.Linear(self._inner, out)]

    def __call__(self, x: mx.array) -> mx.array:
        first, _, last = self.mlp
        return last(self._activation(first(self.ln_q(x).reshape(-1, self._inner))))


class Qwen2Tower(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads, self._merge = fields["embed_dim"], fields["num_heads"], fields["spatial_merge_size"]
        self._head_width, self._theta = width // heads, float(fields["rope_parameters"]["rope_theta"])
        inner, activation = int(width * fields["mlp_ratio"]), ACTIVATIONS[fields["hidden_act"]]
        norm = partial(nn.LayerNorm, width, eps=EPS)
        self.patch_embed = PatchEmbedding(patch_values(fields), width, bias=False)
        self.blocks = [
            TowerLayer(norm, TowerAttention(width, heads), PlainFeed(width, inner, activation, ("fc1", "fc2")))
            for _ in range(fields["depth"])
        ]
        self.merger = Merger(norm(), width, self._merge, fields["hidden_size"])

    def __call__(self, pixels: mx.array, grid: Grid) -> Features:
        x = self.patch_embed(pixels)[None]
        turn = Turn.of(places_of(grid, self._merge), self._head_width, self._theta)
        for block in self.blocks:
            x = block(x, turn)
        return Features(self.merger(x))


class GatedFeed(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(width, inner)
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True, slots=True)
class Windows:
    """Patches sorted by windows, each filled up to the same number."""

    order: np.ndarray
    """int [windows, patches of a window]: which patch stands there, the first one in the places that are filled up."""
    real: np.ndarray
    """bool, of the same shape: False in the places that are filled up."""

    @classmethod
    def of(cls, grid: Grid, merge: int, side: int) -> Windows:
        """Squares of `side` blocks of merge · merge patches, cut at the edges of the picture."""
        _, rows, columns = still(grid, merge)
        rows, columns = rows // merge, columns // merge
        down, across = -(-rows // side), -(-columns // side)
        square = np.full((down * side, across * side), -1)
        square[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        blocks = square.reshape(down, side, across, side).swapaxes(1, 2).reshape(down * across, side * side, 1)
        # In each window the places that are filled up go last, so that what is merged stays together.
        blocks = np.take_along_axis(blocks, np.argsort(blocks < 0, axis=1, kind="stable"), axis=1)
        patches = blocks * merge**2 + np.arange(merge**2)
        real = np.broadcast_to(blocks >= 0, patches.shape)
        return cls(np.where(real, patches, 0).reshape(len(patches), -1), real.reshape(len(patches), -1))

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """The places that are real, int [N], and for each place which of those stands there; in one that is filled up,
        any."""
        real = self.real.ravel()
        return np.flatnonzero(real), np.where(real, np.cumsum(real) - 1, 0)

    def back(self, merge: int) -> np.ndarray:
        """int [tokens]: at which place each merged block of the picture stands, among all places."""
        block = self.order[:, :: merge**2].ravel() // merge**2
        at = np.flatnonzero(self.real[:, :: merge**2].ravel())
        return at[np.argsort(block[at])]


class Qwen25Tower(nn.Module):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads, self._merge = fields["hidden_size"], fields["num_heads"], fields["spatial_merge_size"]
        self._head_width, self._theta = width // heads, float(fields["rope_parameters"]["rope_theta"])
        self._side = fields["window_size"] // self._merge // fields["patch_size"]
        self._whole = frozenset(fields["fullatt_block_indexes"])
        norm = partial(nn.RMSNorm, width, eps=EPS)
        self.patch_embed = PatchEmbedding(patch_values(fields), width, bias=False)
        self.blocks = [
            TowerLayer(
                norm,
                TowerAttention(width, heads),
                GatedFeed(width, fields["intermediate_size"], fields["hidden_act"]),
            )
            for _ in range(fields["depth"])
        ]
        self.merger = Merger(norm(), width, self._merge, fields["out_hidden_size"])

    def __call__(self, pixels: mx.array, grid: Grid) -> Features:
        windows = Windows.of(grid, self._merge, self._side)
        count, size = windows.order.shape
        x = self.patch_embed(pixels)[mx.array(windows.order.ravel())][None]
        places = places_of(grid, self._merge)[windows.order.ravel()]
        turn = Turn.of(places, self._head_width, self._theta).reshape(count, 1, size, self._head_width)
        mask = None if windows.real.all() else mx.array(windows.real).reshape(count, 1, 1, size)
        real, back = windows.whole()
        # Where every patch sees every other one, nothing is filled up and nothing masked.
        whole, spread = Turn.of(places[real], self._head_width, self._theta), mx.array(back)
        kept = mx.array(real)
        for number, block in enumerate(self.blocks):
            if number in self._whole:
                x = block(x.reshape(1, count * size, -1)[:, kept], whole)[:, spread]
            else:
                x = block(x.reshape(count, size, -1), turn, mask)
        return Features(self.merger(x.reshape(1, count * size, -1))[mx.array(windows.back(self._merge))])
