"""Rows on mlx-lm's own batch caches, for models whose state does not fit fixed columns, or that cannot be batched.

Joining merges and finishing filters, so rows move and the cost of both follows the size of the cache. `serial` keeps
one row at a time on the model's plain caches: the way out for families whose batched masks are wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.store import Forward, Reading, Seating
from rollout_server.engine.messages.options import JOINED_KV_SPARE

PADDED_WIDTH = 128
"""Tokens of one prompt that are read beside others at most. A class may be right up to where its own chunks end, and
wrong for a row that ends exactly there: the self-test reads rows of this length and of its half."""
MOST_MERGED = 256 * 2**20
"""Bytes of states that are copied at most for prompts to be read together."""


class MlxCacheKV:
    """The methods of `store.KVStore`. A place is the row's current index in the batch. `row_cells` is what a row's
    state of fixed size costs, counted in columns. `snapshots` says that a copy of a row's caches is all there is of
    its state, so that it may be kept; `pads` that prompts of several lengths may be read together, padded with the
    token `padding`."""

    cuts = False
    steps_overlap = False

    def __init__(
        self,
        make_caches: Callable[[], list[Any]],
        *,
        row_cells: int = 0,
        serial: bool = False,
        snapshots: bool = False,
        pads: bool = False,
        padding: int = 0,
    ) -> None:
        self.layers: list[Any] = []
        self.capacity = 0
        self.snapshots = snapshots
        self.pads = pads
        self._padding = padding
        self._make_caches = make_caches
        self._row_cells = row_cells
        self._reserved = 0
        self._serial = serial

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def allocated_cells(self) -> int:
        return 0  # nothing is kept for rows to come

    def places(self, rows: int) -> int:
        return rows

    def cells_after_step(self, width: int) -> int:
        return self.cells(0, width)

    def step_places(self, last: int) -> int:
        return self.capacity  # only rows that sit have one

    def minimum_cells(self, rows: int, width: int) -> int:
        return rows * (width + JOINED_KV_SPARE + self._row_cells)

    def may_grow_to(self, width: int, cells: int) -> None:
        """The caches grow by themselves."""

    def cells(self, count: int, columns: int) -> int:
        rows = self.capacity + self._reserved + count
        return rows * (columns + JOINED_KV_SPARE + self._row_cells)

    def pending(self) -> list[Any]:
        return [layer.state for layer in self.layers]

    def begin(self, prompt: Prompt, count: int, columns: int) -> None:
        self._reserved += count
        if prompt.kept is None:
            prompt.kept = self._make_caches()

    def cancel(self, prompt: Prompt, count: int) -> None:
        self._reserved -= count
        prompt.kept = None

    def prefill(
        self, forward: Reading, chunks: Sequence[tuple[Prompt, int]], route: Callable[[list[int]], None]
    ) -> None:
        for together in self._runs(chunks):
            route([prompt.slot for prompt, _ in together])
            kept = [_kept(prompt) for prompt, _ in together]
            longest = max(n for _, n in together)
            rows = [list(prompt.tokens[prompt.prefilled : prompt.prefilled + n]) for prompt, n in together]
            tokens = mx.array([row + [self._padding] * (longest - len(row)) for row in rows], dtype=mx.int32)
            if len(together) == 1:
                forward(tokens, kept[0])
            else:
                self._read_padded(forward, tokens, kept, [len(row) for row in rows])
            mx.eval([cache.state for caches in kept for cache in caches])
            for prompt, n in together:
                prompt.prefilled += n

    def _runs(self, chunks: Sequence[tuple[Prompt, int]]) -> Iterator[list[tuple[Prompt, int]]]:
        """Chunks that one forward reads."""
        run: list[tuple[Prompt, int]] = []
        held = 0
        for prompt, n in chunks:
            own = sum(cache.nbytes for cache in _kept(prompt))
            apart = not self.pads or n > PADDED_WIDTH or (run and run[0][1] > PADDED_WIDTH)
            if run and (apart or held + own > MOST_MERGED):
                yield run
                run, held = [], 0
            run.append((prompt, n))
            held += own
        if run:
            yield run

    @staticmethod
    def _read_padded(forward: Forward, tokens: mx.array, kept: list[list[Any]], lengths: list[int]) -> None:
        """Reads the first `lengths` of tokens [B, N] on from caches of one sequence each, which it replaces."""
        merged = [type(caches[0]).merge(caches) for caches in zip(*kept, strict=True)]
        for layer in merged:
            layer.prepare(lengths=lengths, right_padding=[tokens.shape[1] - length for length in lengths])
        forward(tokens, merged)
        for layer in merged:
            layer.finalize()
        for row, caches in enumerate(kept):
            caches[:] = [layer.extract(row) for layer in merged]

    def inherit(self, prompt: Prompt, donor: Any, place: int) -> None:
        raise RuntimeError("A state that cannot be cut has no prompt to give.")

    def remember(self, places: dict[int, object]) -> None:
        """Nothing stays behind."""

    def seat(self, seatings: Sequence[Seating]) -> list[list[int]]:
        return [self._seat(*seating) for seating in seatings]

    def _seat(self, prompt: Prompt, count: int, keep: bool) -> list[int]:
        caches = prompt.kept
        if caches is None:
            raise RuntimeError("A prompt is seated before it has begun.")
        if self._serial:
            if self.capacity or count != 1:
                raise RuntimeError("This model is served one row at a time.")
            self.layers = copy.deepcopy(caches) if keep else caches
        else:
            joining = [type(cache).merge([cache] * count) for cache in caches]
            if self.layers:
                for layer, more in zip(self.layers, joining, strict=True):
                    layer.extend(more)
            else:
                self.layers = joining
            mx.eval([layer.state for layer in self.layers])
        if not keep:
            prompt.kept = None
        self._reserved -= count
        self.capacity += count
        return list(range(self.capacity - count, self.capacity))

    def copy(self, place: int, length: int) -> list[Any]:
        # Alone, a row's caches are the model's own, and nobody else will use them.
        kept = self.layers if self._serial else [layer.extract(place) for layer in self.layers]
        mx.eval([cache.state for cache in kept])
        return kept

    def set_positions(self, offsets: Sequence[int | None], width: int, deltas: Sequence[int] | None = None) -> None:
        """The caches keep their own offsets."""

    def moves_on_leave(self, leaving: int) -> bool:
        return True

    def shrink(self, columns: int) -> dict[int, int] | None:
        """Filtering left nothing over."""
        return None

    def leave(self, places: Sequence[int], scrub: Sequence[int]) -> dict[int, int] | None:
        if not places:
            return None
        gone = set(places)
        stay = [place for place in range(self.capacity) if place not in gone]
        if stay:
            for layer in self.layers:
                layer.filter(mx.array(stay))
            mx.eval([layer.state for layer in self.layers])
        else:
            self.layers = []
        self.capacity = len(stay)
        return {old: new for new, old in enumerate(stay)}


def _kept(prompt: Prompt) -> list[Any]:
    if prompt.kept is None:
        raise RuntimeError("A prompt is fed before it has begun.")
    return prompt.kept
