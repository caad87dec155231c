"""Feed-forward layers with another activation than the one that their family's code has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.model.checkpoint.corrections.activation import NAMES
from rollout_server.quoting import quoted

FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu by tanh": nn.gelu_approx,
    "quick gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "relu squared": nn.relu2,
}
STRUCTURE = 0.02
"""How far, of the largest value, a layer put together anew may be from what it was: half precision is coarse."""


def set_activation(module: nn.Module, own: str, field: str, value: Any) -> str | None:
    """Gives every feed-forward layer of `module` the activation that config.json names; the sentence of why not, if
    one cannot be put together."""
    wanted = NAMES.get(str(value), "")
    refusal = f"{field} is {quoted(value)}, and this family's code has {own}"
    if wanted not in FUNCTIONS or own not in FUNCTIONS:
        return refusal
    changed: dict[str, nn.Module] = {}
    for number, layer in enumerate(getattr(module, "layers", ())):
        feed = layer.get("mlp") if isinstance(layer, nn.Module) else None
        if feed is None or not _is_made_of(feed, FUNCTIONS[own]):
            return refusal
        changed[f"layer {number}"] = layer
    for layer in changed.values():
        layer["mlp"] = Feed(layer["mlp"], FUNCTIONS[wanted])
    return None if changed else refusal


class Feed(nn.Module):
    """A feed-forward layer with the linear layers of another one, under their names, and an activation of choice."""

    def __init__(self, feed: nn.Module, function: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        for name, child in feed.children().items():
            self[name] = child
        self._names = tuple(feed.children())
        self._function = function

    def __call__(self, x: mx.array) -> mx.array:
        if set(self._names) == {"gate_proj", "up_proj", "down_proj"}:
            return self["down_proj"](self._function(self["gate_proj"](x)) * self["up_proj"](x))
        first, second = self._names
        return self[second](self._function(self[first](x)))


def _is_made_of(feed: nn.Module, function: Callable[[mx.array], mx.array]) -> bool:
    """Returns whether the layer computes what `Feed` does with the same activation."""
    children = list(feed.children().values())
    if len(children) not in (2, 3) or not all(isinstance(c, nn.Linear | nn.QuantizedLinear) for c in children):
        return False
    if len(children) == 3 and set(feed.children()) != {"gate_proj", "up_proj", "down_proj"}:
        return False
    first = children[0]
    width = first.weight.shape[-1] * (32 // first.bits if isinstance(first, nn.QuantizedLinear) else 1)
    x = mx.random.normal((1, 3, width), key=mx.random.key(0))
    x = x.astype(first.scales.dtype if isinstance(first, nn.QuantizedLinear) else first.weight.dtype)
    before, after = (each(x).astype(mx.float32) for each in (feed, Feed(feed, function)))
    return bool(mx.max(mx.abs(before - after)) <= STRUCTURE * mx.max(mx.abs(before)))
