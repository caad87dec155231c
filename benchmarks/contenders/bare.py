"""The denominator: the model's forward and an argmax, nothing else, as fast as it can honestly be."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache

from benchmarks.measure import Load


class UnmaskedLoop:
    """The same over mlx-lm's plain `KVCache`, which needs no mask where all prompts are of one length, and serves no
    others."""

    name = "bare, no mask"

    def __init__(self, model: nn.Module, prompts: list[list[int]], load: Load) -> None:
        self._model = model
        self._prompts = mx.array(prompts)
        self._load = load

    def run(self) -> tuple[int, float]:
        caches = [KVCache() for _ in self._model.layers]
        token = self._next(self._prompts, caches)
        mx.eval(token)
        token = self._next(token[:, None], caches)
        mx.async_eval(token)
        begin = time.perf_counter()
        for _ in range(self._load.steps):
            ahead = self._next(token[:, None], caches)
            mx.async_eval(ahead)
            token.tolist()
            token = ahead
        seconds = time.perf_counter() - begin
        mx.eval(token)
        return self._load.tokens, seconds

    def _next(self, tokens: mx.array, caches: list[KVCache]) -> mx.array:
        return mx.argmax(self._model(tokens, cache=caches)[:, -1], axis=-1)


class BareLoop:
    """Greedy decoding over mlx-lm's own `BatchKVCache`, one step dispatched ahead. No log-probabilities, no finish."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], load: Load, *, compiled: bool) -> None:
        self.name = "bare, compiled" if compiled else "bare"
        self._model = model
        self._prompts = mx.array(prompts)
        self._load = load
        # The written length is a Python integer inside the cache, so each step is a graph of its own:
        # it is an argument here, and the warm-up round traces all of them.
        self._step = mx.compile(self._decode) if compiled else self._decode

    def run(self) -> tuple[int, float]:
        caches = [BatchKVCache([0] * len(self._prompts)) for _ in self._model.layers]
        token = mx.argmax(self._model(self._prompts, cache=caches)[:, -1], axis=-1)
        arrays = [(cache.keys, cache.values, cache.offset) for cache in caches]
        mx.eval(token, arrays)
        length = self._load.prompt_tokens
        del caches  # A second reference to the keys would turn every write into a copy.
        token, arrays = self._step(token, arrays, length)
        mx.async_eval(token, arrays)
        begin = time.perf_counter()
        for step in range(1, self._load.steps + 1):
            ahead, arrays = self._step(token, arrays, length + step)
            mx.async_eval(ahead, arrays)
            token.tolist()
            token = ahead
        seconds = time.perf_counter() - begin
        mx.eval(token, arrays)
        return self._load.tokens, seconds

    def _decode(self, token: mx.array, arrays: list[Any], length: int) -> tuple[mx.array, list[Any]]:
        caches = []
        for keys, values, offset in arrays:
            cache = BatchKVCache([0] * len(token))
            cache.keys, cache.values, cache.offset, cache._idx = keys, values, offset, length
            caches.append(cache)
        logits = self._model(token[:, None], cache=caches)
        return mx.argmax(logits[:, -1], axis=-1), [(cache.keys, cache.values, cache.offset) for cache in caches]
