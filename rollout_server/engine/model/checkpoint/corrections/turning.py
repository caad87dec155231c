"""Compares how each layer of a loaded model turns queries and keys with what config.json says, and gives those that
turn otherwise a RoPE that is right. A class may drop a field, leave a type of scaling out or compute it otherwise; what
it does about positions can be measured whatever its source looks like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from rollout_server.engine.model.checkpoint.corrections.rope import frequencies, is_nested, of_kind

POSITIONS = (1, 8, 64, 512, 4096)
WITHIN = 2.0
"""Radians up to which a pair of dimensions is looked at: beyond, rounding shows."""
TOLERANCE = 1e-4


class FrequencyRoPE(nn.Module):
    """RoPE by given frequencies, float32 [dims / 2] radians per position, the turned part multiplied by `scale`."""

    def __init__(self, frequency: np.ndarray, scale: float, *, traditional: bool) -> None:
        super().__init__()
        self.dims = 2 * len(frequency)
        self.traditional = traditional
        self._scale = scale
        with np.errstate(divide="ignore"):
            self._freqs = mx.array((1.0 / frequency).astype(np.float32))

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self._scale != 1.0:
            x = x.at[..., : self.dims].multiply(self._scale)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


@dataclass(frozen=True, slots=True)
class Turned:
    """What was found."""

    checked: int = 0
    """Layers that turn as config.json says, now if not before."""
    replaced: int = 0


def turn_as_said(
    module: nn.Module, rope: Mapping[str, Any], layer_types: Sequence[str] | None, head_dim: int, longest: int | None
) -> Turned:
    """Checks every RoPE of `module` and replaces those that are wrong. `longest` is `max_position_embeddings`."""
    checked, wrong = 0, dict[str, nn.Module]()
    for path, layer, own in ropes(module):
        part = _part_of(path, rope, layer_types)
        if part is None:
            continue
        dims = own
        if own == head_dim and part.get("rope_type") != "proportional":
            # A class that passes over the field turns the whole head.
            dims = int(head_dim * float(part.get("partial_rotary_factor") or 1.0))
        if (said := frequencies(part, dims, longest)) is None:
            continue
        checked += 1
        traditional = bool(getattr(layer, "traditional", "Deepseek" in type(layer).__name__))
        if dims != own or not _turns_so(layer, traditional, *said, longest):
            wrong[path] = FrequencyRoPE(*said, traditional=traditional)
    if wrong:
        module.update_modules(tree_unflatten(list(wrong.items())))
    return Turned(checked, len(wrong))


def ropes(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, layer, dimensions that it turns)"""
    for path, layer in module.named_modules():
        if not {"rope", "rotary_emb"} & {path.rpartition(".")[2]}:
            continue
        dims = getattr(layer, "dims", getattr(layer, "dim", None))
        if dims is None and "_freqs" in layer:
            dims = 2 * layer["_freqs"].size
        if isinstance(dims, int):
            yield path, layer, dims


def _part_of(path: str, rope: Mapping[str, Any], layer_types: Sequence[str] | None) -> dict[str, Any] | None:
    if not is_nested(rope):
        return dict(rope)
    number = re.search(r"\.(\d+)\.", path)
    if number is None or layer_types is None or int(number[1]) >= len(layer_types):
        return None
    return of_kind(rope, layer_types[int(number[1])])


def _turns_so(layer: nn.Module, traditional: bool, frequency: np.ndarray, scale: float, longest: int | None) -> bool:
    """Feeds every unit vector at some positions and compares the cosines and sines that come out."""
    pairs = len(frequency)
    first, second = np.arange(pairs), np.arange(pairs) + pairs
    if traditional:
        first, second = 2 * np.arange(pairs), 2 * np.arange(pairs) + 1
    for position in POSITIONS:
        if longest is not None and position >= longest:
            break
        angle = frequency * position
        seen = np.abs(angle) <= WITHIN
        turned = np.array(layer(mx.eye(2 * pairs)[None, :, None, :], offset=position)[0, :, 0], np.float64)
        cosine, sine = turned[first, first], turned[first, second]
        gap = np.maximum(np.abs(cosine - scale * np.cos(angle)), np.abs(sine - scale * np.sin(angle)))
        if not np.all(gap[seen] <= TOLERANCE * max(1.0, scale)):
            return False
    return True
