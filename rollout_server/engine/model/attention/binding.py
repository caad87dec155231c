"""Lets a model's decode steps attend as their cache says. mlx-lm's classes call `scaled_dot_product_attention` by a
name of their module, and give it the layer's cache: within `bound` that name asks the cache first."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.kv_cache.padded_layer import PaddedLayer

NAME = "scaled_dot_product_attention"
ONE_AT_A_TIME = threading.Lock()
"""Held while a name is bound, and never over a forward."""


def modules_of(model: nn.Module) -> tuple[ModuleType, ...]:
    """The modules whose classes the model is made of, as far as they have the name."""
    found = {type(layer).__module__ for _, layer in model.named_modules()}
    return tuple(sys.modules[name] for name in sorted(found) if NAME in vars(sys.modules[name]))


@contextmanager
def bound(modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """Within it, these modules' attention is that of `PaddedLayer.attend` wherever a layer's cache has one. Models of a
    family share the modules, and each runs on a thread of its own: the last of those that are within unbinds."""
    with ONE_AT_A_TIME:
        for module in modules:
            _enter(module)
    try:
        yield
    finally:
        with ONE_AT_A_TIME:
            for module in modules:
                _leave(module)


def _enter(module: ModuleType) -> None:
    now = getattr(module, NAME)
    asking = now if isinstance(now, _Asking) else _Asking(now)
    asking.inside += 1
    setattr(module, NAME, asking)


def _leave(module: ModuleType) -> None:
    asking = getattr(module, NAME)
    asking.inside -= 1
    if not asking.inside:
        setattr(module, NAME, asking.own)


class _Asking:
    """mlx-lm's attention of a module, and how many forwards are within `bound`."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.inside = 0

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """See mlx_lm.models.base."""
        if isinstance(cache, PaddedLayer):
            found = cache.attend(queries, keys, values, scale, mask, sinks)
            if found is not None:
                return found
        plain: mx.array = self.own(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return plain
