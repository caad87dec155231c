"""KV memory of the running rows: fixed places that a row keeps from its first token to its last.

`PaddedKV` holds, per layer, one array [rows, heads, columns, head size]. A row writes its own column by scatter and
reads the columns up to the longest live row, so joining and leaving never touch the other rows. Models whose state is
not columns (recurrent, chunked, hybrid) use `mlx_caches.MlxCacheKV` behind the same methods.

An array is written in place only if nothing else holds it when the step is *scheduled*; on the CPU that includes the
readers of a step still running. The batch therefore builds step k+1 while step k runs, but launches it after k ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from adapters.kernels.numbers import LEAST
from rollout_server.engine.kv_cache.padded_layer import Attend, Cells, PaddedLayer, Window
from rollout_server.engine.kv_cache.prefix_tree import Block, Columns, Layers, Segment, arrays_of
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.sizes import HEADROOM, few_columns, few_widths, padded, row_bucket
from rollout_server.engine.kv_cache.store import Piece, Reading, Seating
from rollout_server.engine.messages.options import KV_BUCKET as COLUMN_BUCKET
from rollout_server.engine.sight.seen import Seen, blocks_of, rotary_of, seen_of

COPIED_TOKENS = 4096
"""Tokens of the prompts whose KV is copied to their samples at once."""


class PaddedKV:
    """Rows with columns. `windows` holds, per layer, the sliding window in tokens or None. `coarse` has few distinct
    widths, and numbers of columns as far as there is room, for steps that are compiled for each. `packs` keeps keys and
    values in 8 bits. `attend` computes what decode steps attend to, where the model is bound to ask for it
    (`engine/model/forward/functions`); they then have one width, however long their rows are."""

    cuts = True

    @property
    def steps_overlap(self) -> bool:
        return self.attend is not None

    def __init__(
        self,
        windows: Sequence[int | None],
        max_rows: int,
        *,
        coarse: bool = False,
        packs: bool = False,
        attend: Attend | None = None,
    ) -> None:
        self.layers: list[Any] = [PaddedLayer(self, window, packs=packs) for window in windows]
        self._coarse = coarse
        self.attend = attend
        self.capacity = 0
        self.columns = 0
        self.window: Window
        self._max_rows = max_rows
        self._ceiling = 0
        self._free: list[int] = []
        self._remains: dict[int, object] = {}
        """Free places that still hold a prompt, and whose."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in (layer.keys, layer.values) if array is not None)

    def places(self, rows: int) -> int:
        return row_bucket(rows, self._max_rows)

    @property
    def allocated_cells(self) -> int:
        return self.capacity * self.columns

    def cells_after_step(self, width: int) -> int:
        return self.capacity * self._grown(width + 1)

    def step_places(self, last: int) -> int:
        # Where shapes are traced or have kernels, another one costs more than the places that it leaves out.
        if self._coarse or self.attend is not None:
            return self.capacity
        return min(self.capacity, row_bucket(last + 1, self._max_rows))

    def minimum_cells(self, rows: int, width: int) -> int:
        return self.places(rows) * round_up(width + 1, COLUMN_BUCKET) if rows else 0

    def may_grow_to(self, width: int, cells: int) -> None:
        if not self.capacity:
            return
        most = cells // self.capacity // COLUMN_BUCKET * COLUMN_BUCKET
        if width + 1 > max(self.columns, self._ceiling):
            self._ceiling = max(self._ceiling, min(self._roomy(width + 1), most))
        elif self._coarse and (few := few_columns(self._ceiling)) <= most:
            self._ceiling = few

    def cells(self, count: int, columns: int) -> int:
        rows, width = self._plan(count, columns)
        return rows * width

    def begin(self, prompt: Prompt, count: int, columns: int) -> None:
        capacity, self._ceiling = self._plan(count, columns)
        if len(self._free) == self.capacity and (capacity != self.capacity or self.columns > self._ceiling):
            self._renew(prompt, capacity)
        elif capacity != self.capacity:
            self._resize(capacity, min(self.columns, self._ceiling))
        # A group whose KV was kept writes it all at once.
        if prompt.kept is not None:
            self._grow_columns(len(prompt.tokens) + 1)
        elif not self._coarse:  # Else it is not known yet how far they may.
            self._grow_columns(1)
        own = self._holding(prompt)
        # What holds another's prompt is taken last.
        self._free.sort(key=lambda place: (place not in own, place in self._remains, place))
        prompt.places, self._free = [self._free[0], *sorted(self._free[1:count])], self._free[count:]
        if own:
            prompt.prefilled = len(prompt.tokens)
        for place in prompt.places:
            self._remains.pop(place, None)

    def _renew(self, prompt: Prompt, capacity: int) -> None:
        """Arrays of another size, of which nobody needs more than a prompt that one place may still hold."""
        own = self._holding(prompt)
        if not own:
            self._clear()
            self._resize(capacity, 0)
            return
        self._free.remove(own[0])
        self._remains = {}
        self._compact()
        self._free.append(0)
        self._resize(capacity, min(self.columns, self._ceiling))
        self._remains = {0: prompt.owner}

    def _holding(self, prompt: Prompt) -> list[int]:
        """Free places that still hold a prompt."""
        return [place for place in self._free if prompt.owner and self._remains.get(place) is prompt.owner]

    def inherit(self, prompt: Prompt, donor: Any, place: int) -> None:
        length = len(prompt.tokens)
        self._grow_columns(length + 1)
        for layer, theirs in zip(self.layers, donor.layers, strict=True):
            if (pair := theirs.cut(place, 0, length)) is not None:
                mx.eval(pair)
                layer.write(prompt.places[0], 0, *pair)
                mx.eval(layer.keys, layer.values)
        prompt.prefilled = length

    def remember(self, places: dict[int, object]) -> None:
        self._remains |= places

    def cancel(self, prompt: Prompt, count: int) -> None: ...

    def pending(self) -> list[Any]:
        return []

    def _plan(self, count: int, columns: int) -> tuple[int, int]:
        """Places, and the most columns they can come to, after `count` rows of at most `columns` join."""
        used = self.capacity - len(self._free)
        ceiling = round_up(columns + 1, COLUMN_BUCKET)
        wanted = row_bucket(used + count, self._max_rows)
        if wanted > self.capacity or used == 0:
            return wanted, ceiling
        return self.capacity, max(self.columns, ceiling)

    def _clear(self) -> None:
        for layer in self.layers:
            layer.keys = layer.values = None
        self.capacity = self.columns = 0
        self._free, self._remains = [], {}

    def prefill(
        self, forward: Reading, chunks: Sequence[tuple[Prompt, int]], route: Callable[[list[int]], None]
    ) -> None:
        pieces = [
            Piece(p.places[0], p.prefilled, p.tokens[p.prefilled : p.prefilled + n], p.slot, p.sight) for p, n in chunks
        ]
        self.read(forward, pieces, route)
        self.evaluate()
        for prompt, n in chunks:
            prompt.prefilled += n

    def read(self, forward: Reading, pieces: Sequence[Piece], route: Callable[[list[int]], None]) -> mx.array:
        """Runs the pieces through the model, each in its own place; returns logits [pieces, longest piece, V], of
        which those behind a piece's own tokens mean nothing. Nothing is evaluated; see `evaluate`."""
        length, count = max(len(piece.tokens) for piece in pieces), len(pieces)
        if self._coarse:
            length, pieces = padded(length), self._fill_up(pieces)
        ends = [piece.at + len(piece.tokens) for piece in pieces]
        self._grow_columns(max(ends) + 1)
        tokens = [list(piece.tokens) + [0] * (length - len(piece.tokens)) for piece in pieces]
        offset = mx.array([piece.at for piece in pieces], dtype=mx.int32)
        places = mx.array([piece.place for piece in pieces], dtype=mx.int32)
        width = min(self.columns, self._width(max(ends)))
        step = mx.arange(length, dtype=mx.int32)[None]
        own = step < mx.array([len(piece.tokens) for piece in pieces], dtype=mx.int32)[:, None]
        # Padding goes where no row ever stands, see `set_positions`.
        columns = mx.where(own, offset[:, None] + step, self.columns - 1)
        self.window = Window(places, places, offset, columns, width)
        seen = self._see(pieces, length) if any(piece.sight is not None for piece in pieces) else None
        route([piece.slot for piece in pieces])
        inputs = mx.array(tokens, dtype=mx.int32)
        return (forward(inputs, self.layers) if seen is None else forward(inputs, self.layers, seen))[:count]

    def _see(self, pieces: Sequence[Piece], length: int) -> Seen | None:
        """Pictures among the pieces' tokens, and what they do to positions and masks."""
        views = [(piece.sight, piece.at, len(piece.tokens)) for piece in pieces]
        self.window.rotary, self.window.blocks = rotary_of(views, length), blocks_of(views, length)
        return seen_of(views, length)

    @staticmethod
    def _fill_up(pieces: Sequence[Piece]) -> list[Piece]:
        """As many pieces as some bucket has: each shape is planned anew. Those added have no tokens of their own."""
        first = pieces[0]
        spare = Piece(first.place, 0, (), first.slot)
        return [*pieces, *[spare] * (padded(len(pieces)) - len(pieces))]

    def seat(self, seatings: Sequence[Seating]) -> list[list[int]]:
        seated = [each.prompt.places[: each.rows] for each in seatings]
        for (prompt, count, _), places in zip(seatings, seated, strict=True):
            prompt.places = prompt.places[count:]
            if prompt.tokens and prompt.kept is not None:
                self._fill(places, prompt.kept)
        alike = [
            (places, len(each.prompt.tokens))
            for each, places in zip(seatings, seated, strict=True)
            if each.prompt.tokens and each.prompt.kept is None and each.rows > 1
        ]
        # Many layers and prompts at once: a device that waits for the host is asked a few times, not for each of them.
        for some in _at_once(alike):
            copies = self.gather([(places[0], 0, length) for places, length in some])
            mx.eval(arrays_of(copies))
            at = 0
            for places, length in some:
                self._fill(places[1:], Columns(Block(copies), at, at + length).layers)
                at += length
            del copies
            self.evaluate()
        for (prompt, _, keep), places in zip(seatings, seated, strict=True):
            if keep and prompt.tokens and prompt.kept is None:
                prompt.kept = self.copy(places[0], len(prompt.tokens))
        self.evaluate()
        return seated

    def _fill(self, places: Sequence[int], layers: Layers) -> None:
        for layer, pair in zip(self.layers, layers, strict=True):
            if pair is not None:
                layer.fill(places, *pair)

    def copy(self, place: int, length: int) -> list[Any]:
        kept = [layer.copy(place, length) for layer in self.layers]
        mx.eval(kept)
        return kept

    def gather(self, pieces: Sequence[tuple[int, int, int]]) -> Layers:
        """The KV of (place, first column, column behind the last) one behind another, [heads, columns, …], copied when
        it is evaluated: before the next write is. One copy an array, however many pieces."""
        places = np.repeat([place for place, _, _ in pieces], [end - start for _, start, end in pieces])
        columns = np.concatenate([np.arange(start, end) for _, start, end in pieces])
        cells = Cells(places, columns)
        return [layer.gather(cells) for layer in self.layers]

    def paste(self, prompt: Prompt, segments: Sequence[Segment]) -> None:
        """Writes what was read before into a prompt's first place, which goes on behind it. Not evaluated."""
        self._grow_columns(sum(segment.count for segment in segments) + 1)
        for segment in segments:
            for layer, pair in zip(self.layers, segment.layers, strict=True):
                if pair is not None:
                    layer.write(prompt.places[0], prompt.prefilled, *(array[:, : segment.count] for array in pair))
            prompt.prefilled += segment.count

    def set_positions(self, offsets: Sequence[int | None], width: int, deltas: Sequence[int] | None = None) -> None:
        self._grow_columns(width + 1)
        # A place without a row writes into the last column, which no row ever fills.
        spare = self.columns - 1
        columns = [spare if value is None else value for value in offsets]
        # At least so many numbers, or kernels would wait for them: `adapters.kernels.numbers`.
        offset = mx.array(columns + [spare] * (LEAST - len(columns)), dtype=mx.int32)[: len(columns)]
        rotary = None if deltas is None else offset + mx.array(list(deltas), dtype=mx.int32)
        self.window = self.decode_window(offset, spare if self.attend else min(spare, self._width(width)), rotary)

    def decode_window(self, offset: mx.array, width: int, rotary: mx.array | None = None) -> Window:
        """The first places in order, one new token each at its column `offset` int32 [places], turned by `rotary`
        where that is another number."""
        return Window(None, mx.arange(offset.size, dtype=mx.int32), offset, offset[:, None], width, rotary)

    def _width(self, needed: int) -> int:
        return few_widths(needed) if self._coarse else round_up(needed, COLUMN_BUCKET)

    @property
    def filled(self) -> bool:  # as from the first forward on
        return all(layer.keys is not None for layer in self.layers)

    def give_arrays(self) -> list[mx.array]:
        """Keys and values of every layer, which holds none afterwards: what runs on them may write in place."""
        arrays = [array for layer in self.layers for array in (layer.keys, layer.values)]
        for layer in self.layers:
            layer.keys = layer.values = None
        return arrays

    def take_arrays(self, arrays: list[mx.array]) -> None:
        """Puts back what `give_arrays` gave, or what came of it, and empties the list."""
        for layer in reversed(self.layers):
            layer.values, layer.keys = arrays.pop(), arrays.pop()

    def moves_on_leave(self, leaving: int) -> bool:
        staying = self.capacity - len(self._free) - leaving
        return staying > 0 and row_bucket(staying, self._max_rows) <= self.capacity // 2

    def leave(self, places: Sequence[int], scrub: Sequence[int]) -> dict[int, int] | None:
        moves = self.moves_on_leave(len(places))
        self._free.extend(places)
        if scrub:
            # Masked is not ignored: 0 × NaN is NaN, so a row that went non-finite must not stay in the array. Free
            # places computed beside it under its version.
            self._remains = {}
            for layer in self.layers:
                layer.blank(self._free)
        return self._compact(1 if self._remains else 0) if moves else None

    def shrink(self, columns: int) -> dict[int, int] | None:
        live = self.capacity - len(self._free)
        if not live:
            self._clear()
            return None
        moved = self._compact() if self.places(live) < self.capacity else None
        self._ceiling = 0
        width = round_up(columns + 1, COLUMN_BUCKET)
        if width < self.columns:
            self._resize(self.capacity, width)
        return moved

    def arrays(self) -> list[mx.array]:
        return [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]

    def evaluate(self) -> None:
        mx.eval(self.arrays())

    def _compact(self, more: int = 0) -> dict[int, int]:
        """To the fewest places for the rows and `more`. Those without a row hold what prompts they can, the last that
        were left before others."""
        free = set(self._free)
        live = [place for place in range(self.capacity) if place not in free]
        capacity = row_bucket(len(live) + more, self._max_rows)
        held = list({id(owner): place for place, owner in self._remains.items()}.values())[::-1]
        stay = (live + held)[:capacity]
        order = mx.array(stay + [stay[0]] * (capacity - len(stay)))
        for layer in self.layers:
            layer.change(lambda array: mx.take(array, order, axis=0))
            mx.eval([a for a in (layer.keys, layer.values) if a is not None])
        self.capacity = capacity
        self._free = list(range(len(live), capacity))
        self._remains = {new: self._remains[stay[new]] for new in range(len(live), len(stay))}
        return {old: new for new, old in enumerate(live)}

    def _grow_columns(self, needed: int) -> None:
        if needed > self.columns:
            self._resize(self.capacity, self._grown(needed))

    def _grown(self, needed: int) -> int:
        if needed <= self.columns:
            return self.columns
        roomy = self._ceiling if self._coarse else min(self._roomy(needed), self._ceiling)
        return round_up(max(needed, roomy), COLUMN_BUCKET)

    def _roomy(self, needed: int) -> int:
        """Half as much again, so that the copies of a row that grows token by token stay constant per token, and room
        to go on behind a prompt, whose rows would all be copied by their first step; where each shape is a trace of its
        own, one of few numbers."""
        if self._coarse:
            return few_columns(needed + HEADROOM)
        return round_up(max(needed + HEADROOM, self.columns * 3 // 2), COLUMN_BUCKET)

    def _resize(self, capacity: int, columns: int) -> None:
        """Changes rows (only more) and columns, one layer after another, so that one layer is copied at a time."""
        if columns < self.columns:
            self._remains = {}
        more_rows, more_columns = capacity - self.capacity, max(0, columns - self.columns)
        padding = [(0, more_rows), (0, 0), (0, more_columns), (0, 0)]
        for layer in self.layers:
            layer.change(lambda array: mx.contiguous(mx.pad(array[:, :, :columns], padding)))
            mx.eval([a for a in (layer.keys, layer.values) if a is not None])
        self._free.extend(range(self.capacity, capacity))
        self.capacity, self.columns = capacity, columns


def _at_once(prompts: Sequence[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Prompts of so many tokens that their copies take little memory; one that is longer alone."""
    some: list[tuple[list[int], int]] = []
    for places, length in prompts:
        if some and sum(count for _, count in some) + length > COPIED_TOKENS:
            yield some
            some = []
        some.append((places, length))
    if some:
        yield some


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step
