"""What Qwen's vision models share: patches in blocks that are merged, rotary positions on two axes in the tower, and
positions on three axes in the decoder (M-RoPE, arXiv:2409.12191)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from rollout_server.models.encoders.attention import attend, attend_in_parts, split_heads
from rollout_server.models.vision.family import Features, Grid

EPS = 1e-6
"""Every norm of the towers has it, whatever the configuration says."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Rotary positions as cosines and sines [..., N, d], which broadcast over the heads."""

    cos: mx.array
    sin: mx.array

    @classmethod
    def of(cls, places: np.ndarray, width: int, theta: float) -> Turn:
        """For int [N, 2] rows and columns and heads of `width` values: each axis turns one half of the pairs."""
        half = width // 2
        frequencies = 1.0 / theta ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
        angles = (places[:, :, None].astype(np.float32) * frequencies.astype(np.float32)).reshape(len(places), -1)
        whole = mx.array(np.concatenate([angles, angles], axis=-1))
        return cls(mx.cos(whole), mx.sin(whole))

    def reshape(self, *shape: int) -> Turn:
        return Turn(self.cos.reshape(shape), self.sin.reshape(shape))

    def __call__(self, x: mx.array) -> mx.array:
        """[B, heads, N, d], turned in float32."""
        first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
        turned = mx.concatenate([-second, first], axis=-1)
        return (x.astype(mx.float32) * self.cos + turned * self.sin).astype(x.dtype)


class PatchEmbedding(nn.Module):
    """The convolution over patches, as the product that it is."""

    def __init__(self, values: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(values, width, bias=bias)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.proj(pixels.astype(self.proj.weight.dtype))


class TowerAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def __call__(self, x: mx.array, turn: Turn, mask: mx.array | None = None) -> mx.array:
        q, k, v = (split_heads(part, self._heads) for part in mx.split(self.qkv(x), 3, axis=-1))
        q, k = turn(q), turn(k)
        return self.proj(attend_in_parts(q, k, v) if mask is None else attend(q, k, v, mask))


class PlainFeed(nn.Module):
    """Up, activation, down, under the names that a family gives them."""

    def __init__(
        self, width: int, inner: int, activation: Callable[[mx.array], mx.array], names: tuple[str, str]
    ) -> None:
        super().__init__()
        self._activation, self._names = activation, names
        self[names[0]] = nn.Linear(width, inner)
        self[names[1]] = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        up, down = (self[name] for name in self._names)
        return down(self._activation(up(x)))


class TowerLayer(nn.Module):
    """Norms stand before both halves."""

    def __init__(self, norm: Callable[[], nn.Module], attention: nn.Module, feed: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = attention
        self.mlp = feed

    def __call__(self, x: mx.array, turn: Turn, mask: mx.array | None = None) -> mx.array:
        x = x + self.attn(self.norm1(x), turn, mask)
        return x + self.mlp(self.norm2(x))


def places_of(grid: Grid, merge: int) -> np.ndarray:
    """int [N, 2]: row and column of each patch of a still picture, in the order of the processor, block by block of
    merge · merge. Raises `ValueError` for what is no still picture."""
    frames, rows, columns = still(grid, merge)
    blocks = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    return blocks.transpose(1, 3, 2, 4, 0).reshape(frames * rows * columns, 2)


def still(grid: Grid, merge: int) -> tuple[int, int, int]:
    """The grid as frames, rows and columns of patches. Raises `ValueError` where there is more than one frame, or
    patches that merge with none."""
    if len(grid) != 3 or grid[0] != 1 or min(grid) < 1 or grid[1] % merge or grid[2] % merge:
        raise ValueError(f"a picture has one frame of rows and columns that are multiples of {merge}, not {grid}")
    return grid[0], grid[1], grid[2]


def positions_of(token_ids: Sequence[int], grids: Sequence[Grid], placeholder: int, merge: int) -> np.ndarray:
    """int32 [3, N]: a token of text stands behind everything before it on all axes; a picture's tokens stand at one
    time, in rows and columns counted from there."""
    ids = np.asarray(token_ids)
    found = np.zeros((3, len(ids)), np.int32)
    at = behind = 0
    for grid in grids:
        _, rows, columns = (side // (1 if axis == 0 else merge) for axis, side in enumerate(still(grid, merge)))
        rest = np.flatnonzero(ids[at:] == placeholder)
        start = at + int(rest[0]) if len(rest) else len(ids)
        end = start + rows * columns
        if end > len(ids) or not np.all(ids[start:end] == placeholder):
            raise ValueError(f"a picture of {rows * columns} tokens has fewer placeholders in a row")
        found[:, at:start] = behind + np.arange(start - at)
        behind += start - at
        found[0, start:end] = behind
        found[1:, start:end] = behind + np.indices((rows, columns)).reshape(2, -1)
        at, behind = end, behind + max(rows, columns)
    if np.any(ids[at:] == placeholder):
        raise ValueError("there are more placeholders than the pictures have tokens")
    found[:, at:] = behind + np.arange(len(ids) - at)
    return found


def patch_values(fields: Mapping[str, Any]) -> int:
    """Values of one patch: channels, frames, rows and columns."""
    size: int = fields["in_channels"] * fields["temporal_patch_size"] * fields["patch_size"] ** 2
    return size


def rope_axes(text: Mapping[str, Any], *, interleaved: bool) -> tuple[int, ...]:
    """Which axis turns each pair of a head, from `mrope_section` of the text's configuration."""
    rope = text["rope_parameters"]
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    if not interleaved:
        section = rope.get("mrope_section") or (16, 24, 24)
        axes = [number % 3 for number, pairs in enumerate(section) for _ in range(pairs)]
    else:
        section = rope.get("mrope_section") or (24, 20, 20)
        axes = [0] * (width // 2)
        for axis in (1, 2):
            axes[axis : section[axis] * 3 : 3] = [axis] * len(axes[axis : section[axis] * 3 : 3])
    if len(axes) != width // 2:
        raise ValueError(f"mrope_section {list(section)} has {len(axes)} pairs, and a head has {width // 2}")
    return tuple(axes)


@dataclass(frozen=True, slots=True, eq=False)
class QwenVision:
    """A tower of Qwen's, whichever of the three."""

    tower: nn.Module
    """pixels [N, values of a patch], grid → `Features`."""
    placeholder: int
    axes: tuple[int, ...]
    merge: int

    sees_both_ways = False

    def tokens(self, grid: Grid) -> int:
        frames, rows, columns = still(grid, self.merge)
        return frames * rows * columns // self.merge**2

    def features(self, pixels: mx.array, grid: Grid) -> Features:
        found: Features = self.tower(pixels, grid)
        return found

    def positions(self, token_ids: Sequence[int], grids: Sequence[Grid]) -> np.ndarray:
        return positions_of(token_ids, grids, self.placeholder, self.merge)
