"""Functions that a model's forward computes by in the place of mlx-lm's.

mlx-lm's classes call functions by names of their module. Within `bound` attention asks the layer's cache first. On a
CPU both attention and SwiGLU are ours, without MLX's exponentials: those are scalar there, 19 ns a number on x86 where
`numerics.exponential` takes 5, and they were a third of a forward (docs/figures.md)."""

from __future__ import annotations

import math
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.kv_cache.padded_layer import PaddedLayer
from rollout_server.engine.sampling.numerics import LARGEST, exponential, on_cpu

SCORES = 2**20
"""Products of queries and keys that are alive at once, where one query's come to no more. The exponential makes six
arrays of that size."""
LOWEST = float(mx.finfo(mx.float32).min)
"""The score of what may not be read, as in MLX: a query that may read nothing reads everything alike."""
ONE_AT_A_TIME = threading.Lock()
"""Held while a name is bound, and never over a forward."""


class _Bound(ABC):
    """mlx-lm's function of a module, and the threads that are within `bound`, with how many forwards each. A model of
    the same family on another thread may not be bound: it computes by mlx-lm's own."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.inside: Counter[int] = Counter()

    @property
    def here(self) -> bool:
        return self.inside[threading.get_ident()] > 0

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
        if self.here and isinstance(cache, PaddedLayer):
            found = cache.attend(queries, keys, values, scale, mask, sinks)
        if found is None and self.here and sinks is None and not hasattr(cache, "bits") and on_cpu():
            found = attend(queries, keys, values, scale, mask)
        if found is None:
            found = self.own(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return found


class _Gate(_Bound):
    def __call__(self, gate: mx.array, x: mx.array) -> mx.array:
        """See mlx_lm.models.activations."""
        found = swiglu(gate, x) if self.here and on_cpu() else None
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
            asked.inside[threading.get_ident()] += 1
            setattr(module, name, asked)


def _leave(module: ModuleType) -> None:
    for name in NAMES:
        asked = getattr(module, name, None)
        if asked is not None:
            asked.inside[threading.get_ident()] -= 1
            if not asked.inside.total():
                setattr(module, name, asked.own)


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None
) -> mx.array | None:
    """softmax(queries · keysᵀ · scale under the mask) · values, as `mx.fast.scaled_dot_product_attention` defines it,
    for float32 [B, heads, N, d] and [B, kv heads, columns, d]. A mask is "causal", or truth values or summands that
    spread over [B, heads, N, columns]. None for what is left to MLX: other dtypes, and a mask for each head."""
    if not queries.dtype == keys.dtype == values.dtype == mx.float32:
        return None
    count, columns = queries.shape[2], keys.shape[2]
    if isinstance(mask, mx.array):
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        if mask.shape[1] != 1:
            return None
    elif mask is not None:
        mask = (mx.arange(columns) <= mx.arange(columns - count, columns)[:, None])[None, None]
    return _in_parts(queries, keys, values, scale, mask)


def _in_parts(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """`_attend` of few enough rows, or of few enough queries of one row, at once."""
    axis = 0 if len(queries) > 1 else 2
    there = queries.shape[axis]
    if there == 1 or math.prod(queries.shape[:3]) * keys.shape[2] <= SCORES:
        return _attend(queries, keys, values, scale, mask)
    found = []
    for half in (slice(0, there // 2), slice(there // 2, there)):
        part = (half,) if axis == 0 else (slice(None), slice(None), half)
        own = mask if mask is None or mask.shape[axis] == 1 else mask[part]
        read = (keys[half], values[half]) if axis == 0 else (keys, values)
        found.append(_in_parts(queries[part], *read, scale, own))
    return mx.concatenate(found, axis=axis)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """`attend` in one piece, for a mask [1 or B, 1, 1 or N, columns]."""
    batch, heads, count, width = queries.shape
    kv_heads, columns = keys.shape[1:3]
    # Heads that share keys are rows of one product.
    shared = (batch, kv_heads, heads // kv_heads * count)
    scores = (queries * scale).reshape(*shared, width) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(batch, kv_heads, -1, count, columns)
    if mask is not None:
        mask = mask[:, :, None]
        scores = mx.where(mask, scores, LOWEST) if mask.dtype == mx.bool_ else scores + mask
    weights = exponential(scores - mx.max(scores, axis=-1, keepdims=True))
    total = mx.sum(weights, axis=-1, keepdims=True)
    found = (weights.reshape(*shared, columns) @ values).reshape(batch, kv_heads, -1, count, values.shape[-1])
    return (found / total).reshape(batch, heads, count, -1)


def swiglu(gate: mx.array, x: mx.array) -> mx.array | None:
    """silu(gate) · x in float32; None for other dtypes."""
    if not gate.dtype == x.dtype == mx.float32:
        return None
    return gate * x / (1.0 + exponential(mx.minimum(-gate, LARGEST)))
