"""Decode forwards traced once for each shape and replayed, for devices that wait for the host.

On a GPU a step of a small model is bound by the host that builds and encodes its operations, so replaying a trace with
fewer, fused ones is worth 15 to 30 %. On a CPU it is worth nothing, and every fused kernel would need a C++ compiler.

A trace may hold what never changes while its parameter set is mounted, the weights. All else goes in and out as
arguments: tokens, offsets, keys and values (so that they are written in place: nothing else holds them meanwhile), and
what the rows' adapter slots are read from, so that a push needs no new trace.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import mlx.core as mx

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.store import Forward

TRACES = 256
"""Kept at most, the least recently used go first."""

Trace = Callable[[mx.array, mx.array, list[mx.array], list[mx.array]], tuple[mx.array, list[mx.array]]]
"""(tokens [B, 1], offset [B], keys and values of each layer, adapter arrays) → (logits, keys and values)."""


class Routed(Protocol):
    """What adapter layers read as they are aimed now; `adapters.resident.slots.AdapterSlots` has both."""

    def lent(self) -> tuple[Hashable, list[mx.array]]:
        """How the layers read them, as a key, and the arrays."""

    def reading(self, arrays: Sequence[mx.array]) -> AbstractContextManager[None]:
        """Within it layers read these instead, in the order of `lent`."""


class Unrouted:
    """What a model without adapter layers has in the place of adapter slots."""

    def lent(self) -> tuple[Hashable, list[mx.array]]:
        return (), []

    def reading(self, arrays: Sequence[mx.array]) -> AbstractContextManager[None]:
        return nullcontext()


class CompiledDecode:
    """A `Forward` for decode steps over `store`; prefill and what cannot be traced go the plain way."""

    def __init__(self, forward: Forward, store: PaddedKV, routed: Routed) -> None:
        self._forward = forward
        self._store = store
        self._routed = routed
        self._traces: OrderedDict[Hashable, Trace] = OrderedDict()

    def __call__(self, tokens: mx.array, layers: list[Any]) -> mx.array:
        """tokens int32 [B, 1] → logits [B, 1, V], as the window of the store says."""
        if not self._store.filled:
            return self._forward(tokens, layers)
        key, adapters = self._routed.lent()
        window = self._store.window
        trace = self._trace((window.width, key), window.width)
        state = self._store.give_arrays()
        try:
            logits, state = trace(tokens, window.offset, state, adapters)
        finally:
            self._store.take_arrays(state)
        return logits

    def _trace(self, key: Hashable, width: int) -> Trace:
        # Shapes need no key: mx.compile traces anew where they change.
        found = self._traces.get(key)
        if found is None:
            found = self._traces[key] = mx.compile(self._step(width))
            if len(self._traces) > TRACES:
                self._traces.popitem(last=False)
        self._traces.move_to_end(key)
        return found

    def _step(self, width: int) -> Trace:
        def step(
            tokens: mx.array, offset: mx.array, state: list[mx.array], adapters: list[mx.array]
        ) -> tuple[mx.array, list[mx.array]]:
            window = self._store.window
            self._store.window = self._store.decode_window(offset, width)
            self._store.take_arrays(state)
            try:
                with self._routed.reading(adapters):
                    logits = self._forward(tokens, self._store.layers)
            finally:
                state = self._store.give_arrays()
                self._store.window = window
            return logits, state

        return step
