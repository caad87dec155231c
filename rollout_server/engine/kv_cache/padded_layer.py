"""One layer of `padded.PaddedKV`: keys and values [rows, heads, columns, head size], as mlx-lm's models use a cache.
In 8 bits the last dimension is `eight_bit.Packing`'s words, and only the model sees numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from rollout_server.engine.kv_cache.eight_bit import Packing


@dataclass(slots=True, eq=False)
class Window:
    """Addresses of one forward, shared by all layers. `offset` int32 [B] is each row's first new column, `columns`
    int32 [B, N] all of them; `rows` int32 [B] the places, or None for the first B of them in order."""

    rows: mx.array | None
    places: mx.array
    offset: mx.array
    columns: mx.array
    width: int
    rotary: mx.array | None = None
    """What turns queries and keys, where it is not their column: int32 [B] or [3, B, N], see `seen.rotary_of`."""
    blocks: mx.array | None = None
    """int32 [2, B, N]: columns that a token reads besides those before it, from and to, as far as they are within its
    window."""
    masks: dict[int | None, mx.array] = field(default_factory=dict)

    def mask(self, window_size: int | None) -> mx.array:
        """bool [B, 1, N, width]: which columns each new token may read."""
        found = self.masks.get(window_size)
        if found is None:
            position = self.columns[:, None, :, None]
            column = mx.arange(self.width, dtype=mx.int32)
            found = column <= position
            if self.blocks is not None:
                begin, end = self.blocks[:, :, None, :, None]
                found = found | ((column >= begin) & (column < end))
            if window_size is not None:
                found = found & (column > position - window_size)
            self.masks[window_size] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class DecodeAttention:
    """What one layer attends to in a decode step, every place in order."""

    queries: mx.array
    """[B, heads, 1, head size]."""
    new_keys: mx.array
    """[B, kv heads, 1, …] as they are kept; not written yet, and so `new_values`."""
    new_values: mx.array
    keys: mx.array
    """[B, kv heads, columns, …] as they are kept; and so `values`."""
    values: mx.array
    offset: mx.array
    """int32 [B], the column of each new token, up to which its row reads. The last column stands for no row."""
    scale: float
    window: int | None
    """Columns that a token reads at most."""
    sinks: mx.array | None
    """[heads], logits that take part in the softmax and have no value."""
    packings: tuple[Packing, Packing] | None
    """Packings of keys and of values, where they are kept in 8 bits."""

    @property
    def group(self) -> int:
        """Numbers that share a scale; 0 where nothing is packed."""
        return 0 if self.packings is None else self.packings[0].group


Attend = Callable[[DecodeAttention], tuple[mx.array, mx.array, mx.array]]
"""Returns values [B, heads, 1, head size], and the arrays in which keys and values are kept, the new ones among them.
Rows whose offset is the last column get zeros."""


class KVLayout(Protocol):
    """What a layer reads of the store that it is one of."""

    capacity: int
    """Rows."""
    columns: int
    window: Window
    """What the forward that is being built reads and writes."""
    attend: Attend | None
    """How decode steps attend where the model's own attention is not what they use."""


class Cells:
    """Columns of places, int64 [cells] both. Where arrays hold them is worked out once for all that are alike."""

    def __init__(self, places: np.ndarray, columns: np.ndarray) -> None:
        self._places, self._columns = places, columns
        self._indices: dict[tuple[int, int], mx.array] = {}

    def of(self, array: mx.array) -> mx.array:
        """[rows, heads, columns, size] → [heads, cells, size]"""
        _, heads, columns, size = array.shape
        if (heads, columns) not in self._indices:
            first = (self._places * heads + np.arange(heads)[:, None]) * columns + self._columns
            self._indices[heads, columns] = mx.array(first, dtype=mx.int64 if array.size // size > 2**31 else mx.int32)
        return mx.take(array.reshape(-1, size), self._indices[heads, columns], axis=0)


class PaddedLayer:
    """One layer's KV as mlx-lm's models use a cache. Has no `__len__` and no `bits`: models test for both."""

    def __init__(self, layout: KVLayout, window_size: int | None, *, packs: bool = False) -> None:
        self._layout = layout
        self._window_size = window_size
        self._packs = packs
        self._packings: tuple[Packing, Packing] | None = None
        """How keys and how values are packed, known from the first forward on."""
        self._pending: _Pending | None = None
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """What models turn queries and keys by, and nothing else."""
        window = self._layout.window
        return window.offset if window.rotary is None else window.rotary

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        return self._layout.window.mask(window_size or self._window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes keys and values [B, heads, N, head size] at the window's columns; returns what each row may read. In
        8 bits that is never the numbers given, not even for these tokens: how a text is cut into chunks must not
        matter."""
        if self._packs:
            self._packings = Packing(keys.shape[3], keys.dtype), Packing(values.shape[3], values.dtype)
            keys, values = self._packings[0].pack(keys), self._packings[1].pack(values)
        if self.keys is None or self.values is None:
            self.keys, self.values = self._allocate(keys), self._allocate(values)
        window = self._layout.window
        if self._layout.attend is not None and window.rows is None:
            fetched = self.keys_and_values()
            self._pending = _Pending(keys, values, *fetched)
            return fetched
        for stored, new in ((self.keys, keys), (self.values, values)):
            if new.shape[2] == 1:
                stored[window.places, :, window.columns[:, 0]] = new[:, :, 0]
            else:
                stored[window.places[:, None], :, window.columns] = new.transpose(0, 2, 1, 3)
        return self.keys_and_values()

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None,
    ) -> mx.array | None:
        """Attends in the place of the model's own attention, from what `update_and_fetch` was given and returned. None
        where that one is to do it. Raises RuntimeError where it would read what was never written, as of keys that
        the model has changed since it fetched them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        attend, window = self._layout.attend, self._layout.window
        known = [size for size, array in window.masks.items() if array is mask]
        if attend is None or keys is not pending.fetched_keys or values is not pending.fetched_values or not known:
            raise RuntimeError("a layer attends to other keys, or under another mask, than it got from its cache")
        if self.keys is None or self.values is None:
            raise RuntimeError("a layer lost its keys and values between writing and reading them")
        step = DecodeAttention(
            queries, pending.keys, pending.values, self.keys, self.values,
            window.offset, scale, known[0], sinks, self._packings,
        )  # fmt: skip
        found, self.keys, self.values = attend(step)
        return found

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        window = self._layout.window
        if self.keys is None or self.values is None:
            raise RuntimeError("A layer reads a KV cache that no layer has written.")
        keys, values = picked(self.keys, window), picked(self.values, window)
        if self._packings is not None:
            return self._packings[0].unpack(keys), self._packings[1].unpack(values)
        return keys, values

    def _allocate(self, like: mx.array) -> mx.array:
        return mx.zeros((self._layout.capacity, like.shape[1], self._layout.columns, like.shape[3]), dtype=like.dtype)

    def fill(self, places: Sequence[int], keys: mx.array, values: mx.array) -> None:
        """Writes a prompt's keys and values [heads, length, head size] into the first columns of `places`."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._allocate(keys[None]), self._allocate(values[None])
        length = keys.shape[1]
        for start, end in runs(places):
            self.keys[start:end, :, :length] = keys[None]
            self.values[start:end, :, :length] = values[None]

    def blank(self, places: Sequence[int]) -> None:
        """Zeroes all columns of `places`."""
        if self.keys is None or self.values is None:
            return
        for start, end in runs(sorted(places)):
            self.keys[start:end] = mx.zeros((), dtype=self.keys.dtype)
            self.values[start:end] = mx.zeros((), dtype=self.values.dtype)

    def copy(self, place: int, length: int) -> tuple[mx.array, mx.array] | None:
        """The first columns of a place as arrays of their own: a live view would make every later write copy the
        whole array."""
        if self.keys is None or self.values is None:
            return None
        return _copied(self.keys, place, 0, length), _copied(self.values, place, 0, length)

    def write(self, place: int, at: int, keys: mx.array, values: mx.array) -> None:
        """Writes keys and values [heads, length, head size] into the columns of a place from `at` on."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._allocate(keys[None]), self._allocate(values[None])
        end = at + keys.shape[1]
        self.keys[place, :, at:end] = keys
        self.values[place, :, at:end] = values

    def cut(self, place: int, start: int, end: int) -> tuple[mx.array, mx.array] | None:
        """Columns of a place as arrays of their own, not evaluated."""
        if self.keys is None or self.values is None:
            return None
        return _copied(self.keys, place, start, end), _copied(self.values, place, start, end)

    def gather(self, cells: Cells) -> tuple[mx.array, mx.array] | None:
        """The KV of cells [heads, cells, …] as arrays of their own, not evaluated."""
        if self.keys is None or self.values is None:
            return None
        return cells.of(self.keys), cells.of(self.values)

    def change(self, function: Callable[[mx.array], mx.array]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = function(self.keys), function(self.values)


def _copied(array: mx.array, place: int, start: int, end: int) -> mx.array:
    """Columns of a place [heads, columns, …] as an array of its own, never a view: what `attend` writes into a place it
    writes there for everybody."""
    if array.shape[1] == 1:
        # What is contiguous already would not be copied.
        return mx.take(array[place], mx.arange(start, end, dtype=mx.int32), axis=1)
    return mx.contiguous(array[place, :, start:end])


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """Keys and values of a decode step that are written when they are attended to, and what the model got instead: the
    kept ones, without them."""

    keys: mx.array
    values: mx.array
    fetched_keys: mx.array
    fetched_values: mx.array


def picked(array: mx.array, window: Window) -> mx.array:
    """The first `width` columns of the window's rows. On a CPU whole rows are copied at the speed of memory, and parts
    of them number by number."""
    rows, width = window.rows, window.width
    if rows is None:
        return array[: window.places.size, :, :width]
    if rows.size == 1 or array.shape[2] <= 2 * width:
        return mx.take(array, rows, axis=0)[:, :, :width]
    return mx.take(array[:, :, :width], rows, axis=0)


def runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring places, which must ascend, as half-open ranges: one write to a range costs a tenth of a scatter to
    its places."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
