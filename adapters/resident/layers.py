"""Linear layers and embeddings that add, row by row, the low-rank product of whichever adapter version each row runs
on, and multiply by its DoRA gain where it has one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from adapters.kernels.decode import DecodeKernel
from adapters.spec import experts_of

RANK_BUCKET = 8
"""Ranks are padded with zeros to a multiple of this, so that few shapes exist and ranks can share a stack."""
WIDTH_BUCKET = 8
"""The rows of B are padded to a multiple of this as well: CUDA's `gather_mm` (mlx 0.32.4) reads eight values of them at
once wherever the rank is a multiple of eight, whether or not the rows begin at a multiple of so many bytes; where they
do not, the access is misaligned, and every later call of the process fails with it."""


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
        "a",
        "b",
        "filled",
        "gain",
        "gained",
        "kernel",
        "one_gain",
        "one_slot",
        "out",
        "pair",
        "rows",
        "scales",
    )

    def __init__(
        self, slots: int, rank: int, layer: tuple[int, int], dtype: mx.Dtype, kernel: DecodeKernel | None = None
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
        self.pair: tuple[mx.array, mx.array] | None = None
        """([in, rank], [rank, out]) when all rows use one slot."""
        self.rows: mx.array | None = None
        """Slot of each row, uint32 [batch], when rows differ."""
        self.one_gain: mx.array | None = None
        """[out], when all rows use one slot and it has a gain."""
        self.one_slot: mx.array | None = None
        """That slot, uint32 [1], where a kernel reads it."""
        self.scales = False
        """True if any row in use has a gain."""
        self.kernel = kernel
        """What adds the products of a linear layer in one launch, where there is such a thing."""

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
        self.pair = self.rows = self.one_gain = self.one_slot = None
        self.scales = False

    def select(self, slot: int) -> None:
        """Every row uses this slot."""
        self.rest()
        rank = self.filled.get(slot)
        if rank is not None:
            # Cut to the version's own rank, so that its numbers do not depend on what else is staged.
            a, b = self.a[slot, ..., :rank, :], self.b[slot, ..., :rank, :]
            if a.ndim > 2:
                # CUDA's `gather_mm` (mlx 0.32.4) takes it that a matrix of a stack begins where the one before ends,
                # whatever the strides say: of matrices that were cut it would read those of other experts.
                a, b = mx.contiguous(a), mx.contiguous(b)
            self.pair = a.swapaxes(-1, -2), b
            self.one_slot = None if self.kernel is None else mx.array([slot], dtype=mx.uint32)
            if self.gain is not None and slot in self.gained:
                self.one_gain = self.gain[slot]
                self.scales = True

    def aim_rows(self, slots: frozenset[int], rows: mx.array) -> None:
        """Row i uses slot rows[i]; `slots` is the set of them."""
        self.rest()
        if not slots.isdisjoint(self.filled):
            self.rows = rows
            self.scales = not slots.isdisjoint(self.gained)

    @property
    def aimed(self) -> bool:
        return self.pair is not None or self.rows is not None

    def lent(self) -> tuple[str, list[mx.array]]:
        """What the layer reads as it is aimed: which fields, and their arrays."""
        if self.kernel is not None and self.aimed:
            slots = self.rows if self.one_slot is None else self.one_slot
            stacks = self.arrays() if self.scales else [self.a, self.b]
            return "kernel gain" if self.scales else "kernel", [*([] if slots is None else [slots]), *stacks]
        fields = ("one_gain",) if self.one_gain is not None else ()
        if self.pair is not None:
            return " ".join(("pair", *fields)), [*self.pair, *([] if self.one_gain is None else [self.one_gain])]
        if self.rows is None:
            return "", []
        scaled = self.scales and self.gain is not None
        return "rows gain" if scaled else "rows", [self.rows, *(self.arrays() if scaled else [self.a, self.b])]

    def read(self, fields: str, arrays: list[mx.array]) -> list[mx.array]:
        """Reads these arrays instead, taken off the front; returns what it read before, for `read` to put back."""
        before = self.lent()[1]
        if fields.startswith("kernel"):
            if self.one_slot is None:
                self.rows = arrays.pop(0)
            else:
                self.one_slot = arrays.pop(0)
            self.a, self.b = arrays.pop(0), arrays.pop(0)
            self.gain = arrays.pop(0) if fields == "kernel gain" else self.gain
        elif fields.startswith("pair"):
            self.pair = arrays.pop(0), arrays.pop(0)
            self.one_gain = arrays.pop(0) if self.one_gain is not None else None
        elif fields:
            self.rows, self.a, self.b = (arrays.pop(0) for _ in range(3))
            self.gain = arrays.pop(0) if fields == "rows gain" else self.gain
        return before

    def decoded(self, x: mx.array, y: mx.array, bias: mx.array | None = None) -> mx.array | None:
        """What `scaled(y + product(x)) + bias` comes to for a layer's y, in one launch; None where no kernel does it. A
        bias only where `scales`. Only while `aimed`."""
        slots = self.rows if self.one_slot is None else self.one_slot
        width, rank = self.a.shape[-1], self.a.shape[-2]
        if self.kernel is None or slots is None or not self.kernel.takes(x, width, rank, self.a.dtype):
            return None
        if slots.size not in (1, x.shape[0]) or y.dtype != self.a.dtype:
            return None
        return self.kernel(x, y, self.a, self.b, slots, self.gain if self.scales else None, bias)

    def product(self, x: mx.array) -> mx.array:
        """(x · A[row]) · B[row], [batch, …, out], for x [batch, …, in]. Only while `aimed`."""
        if self.pair is not None:
            a, b = self.pair
            return self._cut((x @ a) @ b)
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
            hidden = mx.gather_mm(x, a, rhs_indices=experts, sorted_indices=in_order)
            return self._cut(mx.gather_mm(hidden, b, rhs_indices=experts, sorted_indices=in_order))
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
        if self.one_gain is not None:
            return self.one_gain * y
        if self.gain is None or self.rows is None or not self.scales:
            return y
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


class AdaptedLinear(nn.Module):
    """y = gain[slot[row]] * (W·x + (x · A[slot[row]]) · B[slot[row]]) + bias for x [batch, …, in]; the base alone where
    no slot is aimed at, and no gain where no row has one. The bias is not scaled, as in PEFT and in mlx-lm.

    The base layer is the only child, so parameters, freezing and modes are those of the base. The result has the
    dtype of the base's result as long as the stack has that of the activations.
    """

    def __init__(self, base: nn.Linear | nn.QuantizedLinear, stack: SlotStack) -> None:
        super().__init__()
        self.base = base
        self._stack = stack
        if not base.training:
            self.eval()

    def __call__(self, x: mx.array) -> mx.array:
        base, stack = self["base"], self._stack
        if not stack.aimed:
            return base(x)
        if not stack.scales:
            y = base(x)
            found = stack.decoded(x, y)
            return y + stack.product(x) if found is None else found
        y = _without_bias(base, x)
        found = stack.decoded(x, y, base.get("bias"))
        if found is not None:
            return found
        y = stack.scaled(y + stack.product(x))
        return y + base["bias"] if "bias" in base else y


class AdaptedEmbedding(nn.Module):
    """An embedding and, where the head shares its weight, that head; each with a stack of its own once it has one,
    so that an adapter may change either or both."""

    def __init__(self, base: nn.Embedding | nn.QuantizedEmbedding) -> None:
        super().__init__()
        self.base = base
        self._table: SlotStack | None = None
        self._head: SlotStack | None = None
        if not base.training:
            self.eval()

    def attach(self, stack: SlotStack, *, head: bool) -> None:
        if head:
            self._head = stack
        else:
            self._table = stack

    def __call__(self, tokens: mx.array) -> mx.array:
        y, stack = self["base"](tokens), self._table
        return y if stack is None or not stack.aimed else stack.scaled(y + stack.entries(tokens))

    def as_linear(self, x: mx.array) -> mx.array:
        y, stack = self["base"].as_linear(x), self._head
        return y if stack is None or not stack.aimed else stack.scaled(y + stack.product(x))


def _without_bias(layer: nn.Linear | nn.QuantizedLinear, x: mx.array) -> mx.array:
    """W · x, the very product that the layer computes."""
    if "bias" not in layer:
        return layer(x)
    if not isinstance(layer, nn.QuantizedLinear):
        return x @ layer["weight"].T
    return mx.quantized_matmul(
        x,
        layer["weight"],
        scales=layer["scales"],
        biases=layer.get("biases"),
        transpose=True,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )
