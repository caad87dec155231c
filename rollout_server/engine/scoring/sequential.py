"""The slow, obvious reader: one sequence at a time on mlx-lm's own caches. The batched one is checked against it.

Sequences go through in chunks, so that memory does not grow with length × vocabulary; inputs whose values nobody
wants go through the model without its head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from rollout_server.engine.kv_cache.store import Forward
from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.scoring.job import ScoredSequenceState, ScoreJob, SharedPrefix
from rollout_server.engine.scoring.reader import gather, measure
from rollout_server.engine.sight.seen import View


class SequentialReader:
    """The methods of `Reader`, one sequence at a time. `chunk` tokens may have their logits alive at once;
    `row_cells(columns)` is what a sequence costs in KV columns."""

    limit = 1

    def __init__(
        self,
        forward: Forward,
        make_caches: Callable[[], list[Any]],
        route: Callable[[Sequence[Any]], None],
        chunk: int,
        row_cells: Callable[[int], int],
        hidden: Forward | None = None,
        filter_kernel: FilterKernel | None = None,
    ) -> None:
        self._forward = forward
        self._hidden = hidden or forward
        self._filter_kernel = filter_kernel
        self._make_caches = make_caches
        self._route = route
        self._chunk = chunk
        self._row_cells = row_cells
        self._prefix: SharedPrefix | None = None
        self._sequence: ScoredSequenceState | None = None
        self._caches: list[Any] | None = None
        """KV of the sequence; None while its shared prefix is being read."""

    @property
    def size(self) -> int:
        return 0 if self._sequence is None else 1

    @property
    def left(self) -> int:
        return 0 if self._sequence is None else self._sequence.left

    @property
    def cells(self) -> int:
        return 0 if self._sequence is None else self._row_cells(self._sequence.length)

    @property
    def nbytes(self) -> int:
        kept = self._prefix.prompt.kept if self._prefix is not None else None
        caches = {id(cache): cache for cache in [*(self._caches or ()), *(kept or ())]}
        return sum(cache.nbytes for cache in caches.values())

    def cells_with(self, count: int, columns: int) -> int:
        return self.cells + count * self._row_cells(columns)

    def begin(self, prefix: SharedPrefix, count: int) -> None:
        if self._sequence is not None or count != 1:
            raise RuntimeError("This reader takes one sequence at a time.")
        self._prefix, self._sequence, self._caches = prefix, prefix.waiting.popleft(), None
        if prefix.prompt.kept is None:
            prefix.prompt.kept, prefix.prompt.prefilled = self._make_caches(), 0

    def awaits(self, prefix: SharedPrefix) -> bool:
        return False  # Nothing is kept: a state that is no columns cannot be cut.

    def views(self, budget: int) -> list[View]:
        """None: these caches know of no pictures."""
        return []

    def read(self, budget: int) -> list[ScoredSequenceState]:
        sequence, used = self._sequence, 0
        if sequence is None:
            return []
        while used < budget and not sequence.ended:
            used += self._read_on(sequence, budget - used)
        if not sequence.ended:
            return []
        self.reset()
        return [sequence]

    def _read_on(self, sequence: ScoredSequenceState, budget: int) -> int:
        if self._caches is None and (fed := self._read_prompt(budget)):
            return fed
        caches = self._caches
        if sequence.next_input == 0 or caches is None:
            # A run that reads everything again.
            caches = self._make_caches()
            self._caches = caches
        n = min(budget, sequence.left_alike)
        if sequence.scoring and not sequence.of_states:
            n = min(n, self._chunk)
        self._route([sequence.run.placement])
        tokens = mx.array([sequence.tokens[sequence.next_input : sequence.next_input + n]], dtype=mx.int32)
        out = (self._hidden if sequence.of_states else self._forward)(tokens, caches)
        state = [cache.state for cache in caches]
        if sequence.scoring:
            if not sequence.of_states:
                measure(out, [(sequence, n)], state, self._chunk, self._filter_kernel)
            else:
                gather(out, [(sequence, n)], state)
        else:
            mx.eval(state)
        if sequence.fault is None:
            sequence.advance(n)
        return n

    def _read_prompt(self, budget: int) -> int:
        """Feeds the shared prefix; once that is read, gives the sequence caches that hold it and returns 0."""
        prefix, sequence = self._prefix, self._sequence
        kept = prefix.prompt.kept if prefix is not None else None
        if prefix is None or sequence is None or kept is None:
            raise RuntimeError("A sequence is read before it has begun.")
        prompt = prefix.prompt
        if not prompt.done:
            n = min(budget, len(prompt.tokens) - prompt.prefilled)
            self._route([prompt.slot])
            self._forward(mx.array([prompt.tokens[prompt.prefilled : prompt.prefilled + n]], dtype=mx.int32), kept)
            mx.eval([cache.state for cache in kept])
            prompt.prefilled += n
            return n
        self._caches = copy.deepcopy(kept) if prefix.waiting else kept
        if prompt.tokens:
            sequence.advance(len(prompt.tokens))
        return 0

    def drop(self, job: ScoreJob) -> None:
        if self._sequence is not None and self._sequence.job is job:
            self.reset()

    def reset(self) -> None:
        self._prefix = self._sequence = self._caches = None
