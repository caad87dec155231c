"""Decode forwards traced once for each shape and replayed, for devices that wait for the host.

On a GPU a step of a small model is bound by the host that builds and encodes its operations, so replaying a trace with
fewer, fused ones is worth 15 to 30 %. On a CPU it is worth nothing, and every fused kernel would need a C++ compiler.

A trace may hold what never changes while its parameter set is mounted, the weights. All else goes in and out as
arguments: tokens, offsets, keys and values (so that they are written in place: nothing else holds them meanwhile), and
what the rows' adapter slots are read from, so that a push needs no new trace.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.store import Forward

TRACES = 256
"""Kept at most, the least recently used go first."""

Trace = Callable[[mx.array, list[mx.array], list[mx.array], list[mx.array]], tuple[mx.array, list[mx.array]]]
"""(tokens [B, 1], offset and, where it differs, rotary [B], keys and values of each layer, adapter arrays) → (logits,
keys and values)."""


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


@dataclass(slots=True, eq=False)
class Tracing:
    """What a step sees of whoever runs it. It is no part of `Traces`, which hold the steps: a circle is not
    freed at once, and a trace holds weights."""

    store: PaddedKV | None = None
    made: int = 0
    """How often a step was traced."""


class Traces:
    """Traced steps by what they were traced for. Batches of one parameter set may share them: a trace holds that set's
    weights, and of a store only what a call gives it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Trace] = OrderedDict()
        self._tracing = Tracing()

    @property
    def made(self) -> int:
        """How often a step was traced."""
        return self._tracing.made

    def get(self, key: Hashable, make: Callable[[Tracing], Trace]) -> Trace:
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = make(self._tracing)
            if len(self._kept) > TRACES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return found

    @contextmanager
    def running(self, store: PaddedKV) -> Iterator[None]:
        """Within it a step that has to be traced is traced over this store."""
        self._tracing.store = store
        try:
            yield
        finally:
            self._tracing.store = None


class CompiledDecode:
    """A `Forward` for decode steps over `store`; prefill and what cannot be traced go the plain way. `traces` are those
    of the parameter set that is mounted then."""

    def __init__(self, forward: Forward, store: PaddedKV, routed: Routed, traces: Traces | None = None) -> None:
        self._forward = forward
        self._store = store
        self._routed = routed
        self.traces = Traces() if traces is None else traces

    def __call__(self, tokens: mx.array, layers: list[Any]) -> mx.array:
        """tokens int32 [B, 1] → logits [B, 1, V], as the window of the store says."""
        store = self._store
        if not store.filled:
            return self._forward(tokens, layers)
        aimed, adapters = self._routed.lent()
        window, width = store.window, store.window.width
        positions = [window.offset] if window.rotary is None else [window.offset, window.rotary]
        # Other shapes, as of ranks, need no key: mx.compile traces anew where they change.
        trace = self.traces.get(
            (store.capacity, store.columns, width, len(positions), aimed), partial(self._compiled, width)
        )
        state = store.give_arrays()
        try:
            with self.traces.running(store):
                logits, state = trace(tokens, positions, state, adapters)
        finally:
            store.take_arrays(state)
        return logits

    def _compiled(self, width: int, tracing: Tracing) -> Trace:
        forward, routed = self._forward, self._routed

        def step(
            tokens: mx.array, positions: list[mx.array], state: list[mx.array], adapters: list[mx.array]
        ) -> tuple[mx.array, list[mx.array]]:
            # Python runs here only while the step is traced.
            store = tracing.store
            if store is None:
                raise RuntimeError("A step is traced that nobody runs.")
            tracing.made += 1
            window = store.window
            store.window = store.decode_window(positions[0], width, *positions[1:])
            store.take_arrays(state)
            try:
                with routed.reading(adapters):
                    logits = forward(tokens, store.layers)
            finally:
                state = store.give_arrays()
                store.window = window
            return logits, state

        return mx.compile(step)
