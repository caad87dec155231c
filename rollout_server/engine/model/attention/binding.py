"""Lets a model's decode steps attend as their cache says. mlx-lm's classes call `scaled_dot_product_attention` by a
name of their module, and give it the layer's cache: within `bound` that name asks the cache first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.kv_cache.padded_layer import PaddedLayer

NAME = "scaled_dot_product_attention"


def modules_of(model: nn.Module) -> tuple[ModuleType, ...]:
    """The modules whose classes the model is made of, as far as they have the name."""
    found = {type(layer).__module__ for _, layer in model.named_modules()}
    return tuple(sys.modules[name] for name in sorted(found) if NAME in vars(sys.modules[name]))


@contextmanager
def bound(modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """Within it, these modules' attention is that of `PaddedLayer.attend` wherever a layer's cache has one."""
    before = [getattr(module, NAME) for module in modules]
    for module, own in zip(modules, before, strict=True):
        setattr(module, NAME, _asking(own))
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            setattr(module, NAME, own)


def _asking(own: Any) -> Any:
    def attention(
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
        plain: mx.array = own(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return plain

    return attention
