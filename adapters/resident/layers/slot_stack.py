"""A, B and gain of every slot for one layer, and what they add for the rows that are aimed at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from adapters.kernels.low_rank import LowRank, LowRankKernel
from adapters.kernels.numbers import device_numbers
from adapters.resident.layers.expert_product import expert_product
from adapters.spec import experts_of

RANK_BUCKET = 8
"""Ranks are padded with zeros to a multiple of this, so that few shapes exist and ranks can share a stack."""
WIDTH_BUCKET = 8
"""The rows of B are padded to a multiple of this as well: CUDA's `gather_mm` (mlx 0.32.4) reads eight values of them at
once wherever the rank is a multiple of eight, whether or not the rows begin at a multiple of so many bytes; where they
do not, the access is misaligned, and every later call of the process fails with it."""


ONE = 1
"""The index of the rows' slot in the view of two slots that a trace is given."""
MOST_CHOICES = 32_768
"""The most choices of experts by tokens in one gathered product: CUDA launches at most 65,535 at a time."""


def round_rank(rank: int) -> int:
    return -(-rank // RANK_BUCKET) * RANK_BUCKET


def round_width(width: int) -> int:
    """Values a row of B takes in a stack."""
    return -(-width // WIDTH_BUCKET) * WIDTH_BUCKET


class SlotStack:
    """A, B and gain of every slot for one layer, and which of them the next forwards use.

    Deliberately no `nn.Module`: the arrays are no parameters of the model. Nothing but this object may hold them, or
    a write copies the whole stack; `rest` drops the views that routing made.
    """

    __slots__ = (
        "_around",
        "_gain_of_slot",
        "_lent",
        "_pair",
        "a",
        "b",
        "filled",
        "gain",
        "gained",
        "kernel",
        "out",
        "rows",
        "scales",
        "slot",
    )

    def __init__(
        self, slots: int, rank: int, layer: tuple[int, int], dtype: mx.Dtype, kernel: LowRankKernel | None = None
    ) -> None:
        out, width = layer
        self.a = mx.zeros((slots, *experts_of(layer), rank, width), dtype)
        """[slots, rank, in], zero where nothing was written; [slots, experts, rank, in] for stacked experts."""
        self.out = out
        self.b = mx.zeros((slots, *experts_of(layer), rank, round_width(out)), dtype)
        """[slots, rank, out] or [slots, experts, rank, out], scale folded in; zeros fill up its rows."""
        self.gain: mx.array | None = None
        """[slots, out], one where no DoRA version is; made when the first of them comes."""
        self.gained: set[int] = set()
        """Slots whose gain may differ from one."""
        self.filled: dict[int, int] = {}
        """Slots with content → its rank. May name freed slots, whose content is stale until they are written again."""
        self.slot: int | None = None
        """That of all rows, when they use one."""
        self.rows: mx.array | None = None
        """Slot of each row, uint32 [batch]; that of all, uint32 [1], where they use one and a kernel reads it."""
        self.scales = False
        """True if any row in use has a gain."""
        self.kernel = kernel
        """What adds the products of a linear layer in one launch, where there is such a thing."""
        self._pair: tuple[mx.array, mx.array] | None = None
        self._gain_of_slot: mx.array | None = None
        self._around: list[mx.array] | None = None
        self._lent = False
        """While it reads arrays whose slots are only known when they are: those of a trace."""

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.gain is None else self.gain.nbytes)

    @property
    def shape(self) -> tuple[int, int]:
        """(slots, rank) there is room for."""
        return self.a.shape[0], self.a.shape[-2]

    def arrays(self) -> list[mx.array]:
        """What writes change, for the caller to evaluate."""
        return [self.a, self.b] if self.gain is None else [self.a, self.b, self.gain]

    def reserve(self, slots: int, rank: int) -> None:
        """Grow to at least this many slots and this rank, keeping what is there. Evaluates, to bound the peak."""
        have_slots, have_rank = self.a.shape[0], self.a.shape[-2]
        rank = round_rank(rank)
        if slots <= have_slots and rank <= have_rank:
            return
        more, wider = (0, max(slots - have_slots, 0)), (0, max(rank - have_rank, 0))
        pad = [more, *[(0, 0)] * (self.a.ndim - 3), wider, (0, 0)]
        self.a, self.b = mx.pad(self.a, pad), mx.pad(self.b, pad)
        if self.gain is not None:
            self.gain = mx.pad(self.gain, [more, (0, 0)], constant_values=1)
        mx.eval(self.arrays())

    def shrunk(self, slots: int, in_use: set[int]) -> tuple[int, int, bool]:
        """(Slots, rank, whether there are gains) that `shrink` would leave."""
        have_slots, have_rank = self.a.shape[0], self.a.shape[-2]
        rank = round_rank(max((self.filled[slot] for slot in in_use if slot in self.filled), default=0))
        if 2 * rank > have_rank:
            rank = have_rank
        if slots >= have_slots and rank >= have_rank:
            return have_slots, have_rank, self.gain is not None
        return min(slots, have_slots), rank, self.gain is not None and bool(self.gained & in_use)

    def shrink(self, slots: int, in_use: set[int]) -> None:
        """Give back the slots from this number on, and ranks that none in use needs if half of all. Evaluates."""
        slots, rank, gained = self.shrunk(slots, in_use)
        if (slots, rank) == (self.a.shape[0], self.a.shape[-2]):
            return
        # Slices are views, which would keep the whole arrays.
        self.a, self.b = (mx.contiguous(stack[:slots, ..., :rank, :]) for stack in (self.a, self.b))
        if self.gain is not None:
            self.gain = mx.contiguous(self.gain[:slots]) if gained else None
        self.filled = {slot: min(held, rank) for slot, held in self.filled.items() if slot < slots}
        self.gained &= in_use
        mx.eval(self.arrays())

    def write(self, slot: int, a: mx.array, b: mx.array, gain: mx.array | None) -> None:
        """Put a [rank, in], b [rank, out] and a gain [out] into a slot. Lazy: the caller evaluates."""
        # Marked first: if the evaluation fails, the next owner of the slot knows that it is not clean.
        rank = self.filled[slot] = a.shape[-2]
        self.a[slot, ..., :rank, :] = a
        self.b[slot, ..., :rank, : self.out] = b
        if rank < self.a.shape[-2]:
            self.a[slot, ..., rank:, :] = 0
            self.b[slot, ..., rank:, :] = 0
        self._write_gain(slot, gain)

    def clear(self, slot: int) -> None:
        """Zero a slot. Lazy: the caller evaluates."""
        if slot in self.filled:
            self.a[slot] = 0
            self.b[slot] = 0
            self._write_gain(slot, None)

    def _write_gain(self, slot: int, gain: mx.array | None) -> None:
        if gain is None:
            if slot in self.gained and self.gain is not None:
                self.gain[slot] = 1
            return
        if self.gain is None:
            self.gain = mx.ones((self.b.shape[0], self.out), self.b.dtype)
        self.gained.add(slot)
        self.gain[slot] = gain

    def rest(self) -> None:
        """The layer is the bare base until it is aimed again."""
        self.slot = self.rows = self._pair = self._gain_of_slot = self._around = None
        self.scales = False

    def select(self, slot: int, number: mx.array | None = None) -> None:
        """Every row uses this slot. `number` is the same, uint32 [1], where stacks are to share it."""
        self.rest()
        if slot in self.filled:
            self.slot = slot
            self.scales = self.gain is not None and slot in self.gained
            if self.kernel is not None:
                self.rows = device_numbers([slot], mx.uint32) if number is None else number

    def aim_rows(self, slots: frozenset[int], rows: mx.array) -> None:
        """Row i uses slot rows[i]; `slots` is the set of them."""
        self.rest()
        if not slots.isdisjoint(self.filled):
            self.rows = rows
            self.scales = not slots.isdisjoint(self.gained)

    @property
    def aimed(self) -> bool:
        return self.slot is not None or self.rows is not None

    @property
    def pair(self) -> tuple[mx.array, mx.array] | None:
        """([in, rank], [rank, out]) where all rows use one slot that is known now: views, made when they are needed."""
        if self._pair is None and self.slot is not None and not self._lent:
            # Cut to the version's own rank, so that its numbers do not depend on what else is staged.
            rank = self.filled[self.slot]
            a, b = self.a[self.slot, ..., :rank, :], self.b[self.slot, ..., :rank, :]
            if a.ndim > 2:
                # CUDA's `gather_mm` (mlx 0.32.4) takes it that a matrix of a stack begins where the one before ends,
                # whatever the strides say: of matrices that were cut it would read those of other experts.
                a, b = mx.contiguous(a), mx.contiguous(b)
            self._pair = a.swapaxes(-1, -2), b
        return self._pair

    @property
    def one_gain(self) -> mx.array | None:
        """[out], where all rows use one slot that is known now and has a gain."""
        if self._gain_of_slot is None and self.slot is not None and self.scales and not self._lent:
            self._gain_of_slot = None if self.gain is None else self.gain[self.slot]
        return self._gain_of_slot

    def lent(self) -> tuple[str, list[mx.array]]:
        """What the layer reads as it is aimed: which fields, and their arrays, besides `rows`, or `ONE` for a slot."""
        if not self.aimed:
            return "", []
        if self.slot is not None and self.kernel is None:
            gain = self.one_gain
            fields = "pair" if gain is None else "pair one_gain"
            return fields, [*(self.pair or ()), *([] if gain is None else [gain])]
        scaled = self.scales and self.gain is not None
        arrays = self.arrays() if scaled else [self.a, self.b]
        if self.slot is None:
            return "rows gain" if scaled else "rows", arrays
        if self._around is None:
            # The slot and the one before it, whatever their number is and that of all: one trace serves them all, with
            # ONE. Made once and not for each step, which would wait for hundreds of views.
            self._around = [array[self.slot - 1 : self.slot + 1] for array in arrays]
        return "slot gain" if scaled else "slot", self._around

    @contextmanager
    def reading(self, arrays: list[mx.array], rows: mx.array | None) -> Iterator[None]:
        """Within it these arrays, taken off the front, and these rows are read instead."""
        fields = self.lent()[0]
        before = self.a, self.b, self.gain, self.rows, self._pair, self._gain_of_slot
        if fields.startswith("pair"):
            self._pair = arrays.pop(0), arrays.pop(0)
            self._gain_of_slot = arrays.pop(0) if fields == "pair one_gain" else None
        elif fields:
            self.a, self.b = arrays.pop(0), arrays.pop(0)
            self.gain = arrays.pop(0) if fields.endswith("gain") else self.gain
            self.rows, self._pair, self._gain_of_slot = rows, None, None
        self._lent = True
        try:
            yield
        finally:
            self._lent = False
            self.a, self.b, self.gain, self.rows, self._pair, self._gain_of_slot = before

    def takes(self, x: mx.array) -> bool:
        """Returns whether the kernel adds its products for x [rows, …, in]. Only while `aimed`."""
        if self.kernel is None or self.rows is None or self.rows.size not in (1, x.shape[0]):
            return False
        return self.kernel.takes(x, (self.out, self.a.shape[-1]), self.a.shape[-2], self.a.dtype)

    def low_rank(self, y: mx.array, bias: mx.array | None) -> LowRank:
        """What it brings to a launch of the kernel, for a layer's y. A bias only where it `scales`."""
        return LowRank(y, self.a, self.b, self.gain if self.scales else None, bias if self.scales else None)

    def product(self, x: mx.array) -> mx.array:
        """(x · A[row]) · B[row], [batch, …, out], for x [batch, …, in]. Only while `aimed`."""
        if self.pair is not None:
            a, b = self.pair
            return self._cut((x @ a) @ b)
        if self.slot is not None and self.rows is not None:
            a, b = (mx.take(stack, self.rows, axis=0).squeeze(0) for stack in (self.a, self.b))
            return self._cut((x @ a.T) @ b)
        rows = self._rows_of(x)
        hidden = _of_rows(x.reshape(rows.size, -1, x.shape[-1]), self.a.swapaxes(-1, -2), rows)
        return self._cut(_of_rows(hidden, self.b, rows)).reshape(*x.shape[:-1], self.out)

    def entries(self, tokens: mx.array) -> mx.array:
        """A[row]'s columns for the tokens times B[row], [batch, …, out], for ids [batch, …]. Only while `aimed`."""
        if self.pair is not None:
            a, b = self.pair
            return self._cut(a[tokens] @ b)
        rows = self._rows_of(tokens)
        hidden = self.a.swapaxes(-1, -2)[rows[:, None], tokens.reshape(rows.size, -1)]
        return self._cut(_of_rows(hidden, self.b, rows)).reshape(*tokens.shape, self.out)

    def of_experts(self, x: mx.array, experts: mx.array, stacked: mx.array, *, in_order: bool) -> mx.array:
        """(x · A) · B of each choice's expert and row's slot, for x and indices as a SwitchLinear gets them. `stacked`
        is slot × experts + expert. Only while `aimed`."""
        if self.pair is not None:
            a, b = self.pair
            hidden = expert_product(x, a, experts, in_order=in_order)
            return self._cut(expert_product(hidden, b, experts, in_order=in_order))
        a, b = self.a.flatten(0, 1), self.b.flatten(0, 1)

        def some(x: mx.array, stacked: mx.array) -> mx.array:
            hidden = mx.gather_mm(x, a.swapaxes(-1, -2), rhs_indices=stacked)
            return self._cut(mx.gather_mm(hidden, b, rhs_indices=stacked))

        # Many choices are sorted, and flat, each with its own token in x.
        starts = range(0, stacked.size, MOST_CHOICES) if in_order else (0,)
        if len(starts) == 1:
            return some(x, stacked)
        return mx.concatenate([some(x[at : at + MOST_CHOICES], stacked[at : at + MOST_CHOICES]) for at in starts])

    def scaled(self, y: mx.array) -> mx.array:
        """gain[row] * y for y [batch, …, out]; y itself where no row has a gain."""
        if (gain := self.one_gain) is not None:
            return gain * y
        if self.gain is None or self.rows is None or not self.scales:
            return y
        if self.slot is not None:
            return self.gain[self.rows] * y
        return self.gain[self.rows].reshape(self.rows.size, *(1,) * (y.ndim - 2), -1) * y

    def _cut(self, y: mx.array) -> mx.array:
        """y without the columns that only fill up B's rows."""
        return y if y.shape[-1] == self.out else y[..., : self.out]

    def _rows_of(self, x: mx.array) -> mx.array:
        if self.rows is None or x.shape[0] != self.rows.size:
            # A family that flattens rows into tokens would silently get another row's version.
            size = 0 if self.rows is None else self.rows.size
            raise ValueError(f"The batch has {size} rows, but an adapted layer got an input of shape {x.shape}.")
        return self.rows


def _of_rows(x: mx.array, stack: mx.array, rows: mx.array) -> mx.array:
    """x [rows, tokens, in] times stack[rows[i]] [in, out] for row i."""
    if x.shape[1] == 1:
        return mx.gather_mm(x, stack, rhs_indices=rows)
    # Copies of the matrices, which are thin, cost less than one more token a row would; and CUDA's `gather_mm` (mlx
    # 0.32.4) cannot be launched for many tokens a row.
    return x @ stack[rows]
