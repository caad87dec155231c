"""Where mlx-lm's model classes have their hidden states: the part of a model that ends before its head."""

from __future__ import annotations

from operator import attrgetter

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

PLACES = (
    "model",
    "transformer",
    "backbone",
    "language_model.model",
    "language_model.transformer",
    "language_model.backbone",
)
"""What mlx-lm calls it, the layers of a vision model in front."""

UNFIT = (ValueError, TypeError, AttributeError, RuntimeError, IndexError, NotImplementedError)
"""What a model class raises that is called in a way it was not written for."""


def find_trunk(module: nn.Module, vocabulary: int) -> tuple[str, int] | None:
    """The path of the part that gives hidden states [B, N, width] after the final norm, and their width; None for a
    model that has no such part."""
    for place in PLACES:
        *above, _ = place.split(".")
        try:
            owner = attrgetter(".".join(above))(module) if above else module
            trunk = attrgetter(place)(module)
        except AttributeError:
            continue
        # A norm beside it would come after it.
        if isinstance(trunk, nn.Module) and not any("norm" in name for name in owner.children()):
            width = _width(module, trunk)
            if width is not None and width != vocabulary:
                return place, width
    return None


def _width(module: nn.Module, trunk: nn.Module) -> int | None:
    """Of what the part returns, if that is one vector a token."""
    tokens = mx.array([[0, 0]], dtype=mx.int32)
    try:
        hidden = trunk(tokens, cache=make_prompt_cache(module))
    except UNFIT:
        return None
    if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
        return None
    return int(hidden.shape[-1])
