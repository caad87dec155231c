"""Gemma 3's vision half (arXiv:2503.19786): SigLIP, patches pooled into as many tokens for every picture, and a
projection into the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.models.vision.family import Features, Grid
from rollout_server.models.vision.vit import SiglipTower, side


def gemma3(config: Mapping[str, Any]) -> GemmaVision:
    """From config.json as transformers settles it."""
    fields, text = config["vision_config"], config["text_config"]
    tower = GemmaTower(fields, config["mm_tokens_per_image"], text["hidden_size"])
    return GemmaVision(tower, config["image_token_id"], config["mm_tokens_per_image"], side(fields))


class Projector(nn.Module):
    def __init__(self, fields: Mapping[str, Any], tokens: int, hidden: int) -> None:
        super().__init__()
        self._patches, self._kept = side(fields), int(tokens**0.5)
        self._eps = fields["layer_norm_eps"]
        self.mm_input_projection_weight = mx.zeros((fields["hidden_size"], hidden))
        self.mm_soft_emb_norm = Scale(fields["hidden_size"])

    def __call__(self, states: mx.array) -> mx.array:
        """[patches, width] → [tokens, hidden]: means of squares, a norm around one, a product."""
        square = self._patches // self._kept
        kept = self._kept * square
        grid = states.reshape(self._patches, self._patches, -1)[:kept, :kept]
        means = grid.reshape(self._kept, square, self._kept, square, -1).mean(axis=(1, 3)).flatten(0, 1)
        normed = mx.fast.rms_norm(means, 1.0 + self.mm_soft_emb_norm.weight, self._eps)
        return normed @ self.mm_input_projection_weight


class Scale(nn.Module):
    """What a norm multiplies by is one more than this."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros(width)


class GemmaTower(nn.Module):
    def __init__(self, fields: Mapping[str, Any], tokens: int, hidden: int) -> None:
        super().__init__()
        self.vision_tower = SiglipTower(fields)
        self.multi_modal_projector = Projector(fields, tokens, hidden)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.multi_modal_projector(self.vision_tower(pixels[None])[0])


@dataclass(frozen=True, slots=True, eq=False)
class GemmaVision:
    tower: GemmaTower
    placeholder: int
    count: int
    """Tokens of a picture, whatever its shape was."""
    side: int
    """Patches along each side of the square that every picture is made to."""

    sees_both_ways = True
    axes = None

    def tokens(self, grid: Grid) -> int:
        if grid != (self.side, self.side):
            raise ValueError(f"a picture has {self.side} rows and columns of patches, not {grid}")
        return self.count

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        """mlx-lm's decoder multiplies all that goes in by √hidden in bfloat16, so that this is divided by it."""
        found = self.tower(pixels)
        factor = mx.array(found.shape[-1] ** 0.5, mx.bfloat16).astype(mx.float32)
        return Features((found.astype(mx.float32) / factor).astype(found.dtype))

    def positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> None:
        return None
