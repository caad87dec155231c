"""The vision half of Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): a picture is cut into tiles of one
size, beside a small copy of the whole; SigLIP reads each, and squares of patches become one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.vision.family import Features, Grid
from rollout_server.models.vision.vit import SiglipTower, side


def idefics3(config: Mapping[str, Any]) -> TiledVision:
    """From config.json as transformers settles it."""
    patches, factor = side(config["vision_config"]), config["scale_factor"]
    if patches % factor:
        raise ValueError(f"scale_factor {factor} does not divide the {patches} patches along a tile's side")
    return TiledVision(TiledTower(config), config["image_token_id"], (patches // factor) ** 2)


class Projection(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["vision_config"]["hidden_size"] * config["scale_factor"] ** 2
        self.proj = nn.Linear(width, config["text_config"]["hidden_size"], bias=False)


class Connector(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._factor = config["scale_factor"]
        self.modality_projection = Projection(config)

    def __call__(self, x: mx.array) -> mx.array:
        """[tiles, patches, width] → [tiles, tokens, hidden]: a square of patches, row by row, is one token."""
        factor, patches = self._factor, int(x.shape[1] ** 0.5)
        kept = patches // factor
        squares = x.reshape(len(x), kept, factor, kept, factor, -1).transpose(0, 1, 3, 2, 4, 5)
        return self.modality_projection.proj(squares.reshape(len(x), kept**2, -1))


class TiledTower(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.vision_model = SiglipTower(config["vision_config"])
        self.connector = Connector(config)

    def __call__(self, tiles: mx.array) -> mx.array:
        """[tiles, channels, side, side] → [tiles, tokens, hidden]. A tile is full, so that each patch has the position
        of its number. transformers comes to it through fractions in float32, which lead elsewhere for some sides that
        no published model has: of 26, 27 and 32 patches along a side they do not."""
        return self.connector(self.vision_model(tiles))


@dataclass(frozen=True, slots=True, eq=False)
class TiledVision:
    tower: TiledTower
    placeholder: int
    tile: int
    """Tokens of one tile."""

    sees_both_ways = False
    axes = None

    def tokens(self, grid: Grid) -> int:
        """The grid is (rows, columns) of tiles, in front of the copy of the whole; (0, 0) where there is only that."""
        if len(grid) != 2 or (min(grid) < 1 and grid != (0, 0)):
            raise ValueError(f"a picture has rows and columns of tiles, not {grid}")
        return (grid[0] * grid[1] + 1) * self.tile

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        return Features(self.tower(pixels).flatten(0, 1))

    def positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> None:
        return None
