"""Lets a model's forward compute some things otherwise than mlx-lm's classes do. They call functions by names of their
module: within `bound` attention asks the layer's cache first, and on a CPU both that and the gate are `on_cpu`'s."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.kv_cache.padded_layer import PaddedLayer
from rollout_server.engine.model.forward.on_cpu import attend, swiglu
from rollout_server.engine.sampling.numerics import on_cpu

ONE_AT_A_TIME = threading.Lock()
"""Held while a name is bound, and never over a forward."""


class _Bound(ABC):
    """mlx-lm's function of a module, and how many forwards are within `bound`."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.inside = 0

    @abstractmethod
    def __call__(self, *args: Any, **options: Any) -> mx.array: ...


class _Attention(_Bound):
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
        found: mx.array | None = None
        if isinstance(cache, PaddedLayer):
            found = cache.attend(queries, keys, values, scale, mask, sinks)
        if found is None and sinks is None and not hasattr(cache, "bits") and on_cpu():
            found = attend(queries, keys, values, scale, mask)
        if found is None:
            found = self.own(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return found


class _Gate(_Bound):
    def __call__(self, gate: mx.array, x: mx.array) -> mx.array:
        """See mlx_lm.models.activations."""
        found = swiglu(gate, x) if on_cpu() else None
        return self.own(gate, x) if found is None else found


NAMES: dict[str, type[_Bound]] = {"scaled_dot_product_attention": _Attention, "swiglu": _Gate}
"""Each bound name, and what stands there meanwhile."""


def modules_of(model: nn.Module) -> tuple[ModuleType, ...]:
    """The modules whose classes the model is made of, as far as they have one of the names."""
    found = {type(layer).__module__ for _, layer in model.named_modules()}
    return tuple(sys.modules[name] for name in sorted(found) if not NAMES.keys().isdisjoint(vars(sys.modules[name])))


@contextmanager
def bound(modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """Within it these modules' names are ours. Models of a family share the modules, and each runs on a thread of its
    own: the last of those that are within unbinds."""
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
    for name, ours in NAMES.items():
        now = getattr(module, name, None)
        if now is not None:
            asked = now if isinstance(now, _Bound) else ours(now)
            asked.inside += 1
            setattr(module, name, asked)


def _leave(module: ModuleType) -> None:
    for name in NAMES:
        asked = getattr(module, name, None)
        if asked is not None:
            asked.inside -= 1
            if not asked.inside:
                setattr(module, name, asked.own)
