"""One layer of `padded.PaddedKV`: keys and values [rows, heads, columns, head size], as mlx-lm's models use a cache.
In 8 bits the last dimension is `eight_bit.Packing`'s words, and only the model sees numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from rollout_server.engine.kv_cache.eight_bit import Packing


@dataclass(slots=True, eq=False)
class Window:
    """Addresses of one forward, shared by all layers. `offset` int32 [B] is each row's first new column, `columns`
    int32 [B, N] all of them; `rows` int32 [B] the places, or None for every place in order."""

    rows: mx.array | None
    places: mx.array
    offset: mx.array
    columns: mx.array
    width: int
    masks: dict[int | None, mx.array] = field(default_factory=dict)

    def mask(self, window_size: int | None) -> mx.array:
        """bool [B, 1, N, width]: which columns each new token may read."""
        found = self.masks.get(window_size)
        if found is None:
            position = self.columns[:, None, :, None]
            column = mx.arange(self.width, dtype=mx.int32)
            found = column <= position
            if window_size is not None:
                found = found & (column > position - window_size)
            self.masks[window_size] = found
        return found


class KVLayout(Protocol):
    """What a layer reads of the store that it is one of."""

    capacity: int
    """Rows."""
    columns: int
    window: Window
    """What the forward that is being built reads and writes."""


class PaddedLayer:
    """One layer's KV as mlx-lm's models use a cache. Has no `__len__` and no `bits`: models test for both."""

    def __init__(self, layout: KVLayout, window_size: int | None, *, packs: bool = False) -> None:
        self._layout = layout
        self._window_size = window_size
        self._packs = packs
        self._packings: tuple[Packing, Packing] | None = None
        """How keys and how values are packed, known from the first forward on."""
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        return self._layout.window.offset

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
        for stored, new in ((self.keys, keys), (self.values, values)):
            if new.shape[2] == 1:
                stored[window.places, :, window.columns[:, 0]] = new[:, :, 0]
            else:
                stored[window.places[:, None], :, window.columns] = new.transpose(0, 2, 1, 3)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        window = self._layout.window
        if self.keys is None or self.values is None:
            raise RuntimeError("A layer reads a KV cache that no layer has written.")
        keys = picked(self.keys, window.rows, window.width)
        values = picked(self.values, window.rows, window.width)
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
        return mx.contiguous(self.keys[place, :, :length]), mx.contiguous(self.values[place, :, :length])

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
        return mx.contiguous(self.keys[place, :, start:end]), mx.contiguous(self.values[place, :, start:end])

    def change(self, function: Callable[[mx.array], mx.array]) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = function(self.keys), function(self.values)


def picked(array: mx.array, rows: mx.array | None, width: int) -> mx.array:
    """The first `width` columns of some rows, or of all. On a CPU whole rows are copied at the speed of memory, and
    parts of them number by number."""
    if rows is None:
        return array[:, :, :width]
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
