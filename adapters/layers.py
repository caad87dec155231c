"""A linear layer that adds, row by row, the low-rank product of whichever adapter version each row runs on."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

RANK_BUCKET = 8
"""Ranks are padded with zeros to a multiple of this, so that few shapes exist and ranks can share a stack."""


class SlotStack:
    """A and B of every slot for one layer, and which of them the next forwards use.

    Deliberately no `nn.Module`: the arrays are no parameters of the model. Nothing but this object may hold them, or
    a write copies the whole stack; `rest` drops the views that routing made.
    """

    __slots__ = ("a", "b", "filled", "pair", "rows")

    def __init__(self, slots: int, rank: int, layer: tuple[int, int], dtype: mx.Dtype) -> None:
        out, width = layer
        self.a = mx.zeros((slots, rank, width), dtype)
        """[slots, rank, in], zero where nothing was written."""
        self.b = mx.zeros((slots, rank, out), dtype)
        """[slots, rank, out], scale folded in."""
        self.filled: dict[int, int] = {}
        """Slots with content → its rank. May name freed slots, whose content is stale until they are written again."""
        self.pair: tuple[mx.array, mx.array] | None = None
        """([in, rank], [rank, out]) when all rows use one slot."""
        self.rows: mx.array | None = None
        """Slot of each row, uint32 [batch], when rows differ."""

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def reserve(self, slots: int, rank: int) -> None:
        """Grow to at least this many slots and this rank, keeping what is there. Evaluates, to bound the peak."""
        have_slots, have_rank, _ = self.a.shape
        rank = -(-rank // RANK_BUCKET) * RANK_BUCKET
        if slots <= have_slots and rank <= have_rank:
            return
        pad = [(0, max(slots - have_slots, 0)), (0, max(rank - have_rank, 0)), (0, 0)]
        self.a, self.b = mx.pad(self.a, pad), mx.pad(self.b, pad)
        mx.eval(self.a, self.b)

    def write(self, slot: int, a: mx.array, b: mx.array) -> None:
        """Put a [rank, in] and b [rank, out] into a slot and zero the rest of it. Lazy: the caller evaluates."""
        # Marked first: if the evaluation fails, the next owner of the slot knows that it is not clean.
        rank = self.filled[slot] = a.shape[0]
        self.a[slot, :rank] = a
        self.b[slot, :rank] = b
        if rank < self.a.shape[1]:
            self.a[slot, rank:] = 0
            self.b[slot, rank:] = 0

    def clear(self, slot: int) -> None:
        """Zero a slot. Lazy: the caller evaluates."""
        if slot in self.filled:
            self.a[slot] = 0
            self.b[slot] = 0

    def rest(self) -> None:
        """The layer is the bare base until it is aimed again."""
        self.pair = self.rows = None

    def aim(self, slot: int) -> None:
        """Every row uses this slot."""
        self.rest()
        rank = self.filled.get(slot)
        if rank is not None:
            # Cut to the version's own rank, so that its numbers do not depend on what else is staged.
            self.pair = self.a[slot, :rank].T, self.b[slot, :rank]

    def aim_rows(self, slots: frozenset[int], rows: mx.array) -> None:
        """Row i uses slot rows[i]; `slots` is the set of them."""
        self.rest()
        if not slots.isdisjoint(self.filled):
            self.rows = rows


class AdaptedLinear(nn.Module):
    """y = base(x) + (x · A[slot[row]]) · B[slot[row]] for x [batch, …, in]; the base alone where no slot is aimed at.

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
        y = self["base"](x)
        stack = self._stack
        if stack.pair is not None:
            a, b = stack.pair
            return y + (x @ a) @ b
        if stack.rows is not None:
            return y + _gathered(x, stack.a, stack.b, stack.rows).reshape(y.shape)
        return y


def _gathered(x: mx.array, a: mx.array, b: mx.array, rows: mx.array) -> mx.array:
    """(x · A[row]) · B[row], [batch, tokens, out], for x [batch, …, in]."""
    if x.shape[0] != rows.size:
        # A family that flattens rows into tokens would silently get another row's version.
        raise ValueError(f"The batch has {rows.size} rows, but an adapted layer got an input of shape {x.shape}.")
    x = x.reshape(rows.size, -1, x.shape[-1])
    hidden = mx.gather_mm(x, a.swapaxes(-1, -2), rhs_indices=rows)
    return mx.gather_mm(hidden, b, rhs_indices=rows)


def adaptable_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter path → (out, in) of every linear layer, quantised or not, adapted or not, sorted by path."""
    modules = dict(model.named_modules())
    found: dict[str, tuple[int, int]] = {}
    for path, module in modules.items():
        if isinstance(module, AdaptedLinear):
            found[path] = linear_shape(module["base"])
        elif isinstance(module, nn.Linear | nn.QuantizedLinear):
            parent = modules.get(path.rpartition(".")[0])
            if not isinstance(parent, AdaptedLinear):
                found[path] = linear_shape(module)
    return dict(sorted(found.items()))


def linear_shape(layer: nn.Linear | nn.QuantizedLinear) -> tuple[int, int]:
    """(out, in). A quantised weight is packed; its groups count the inputs."""
    if isinstance(layer, nn.QuantizedLinear):
        out, groups = layer.scales.shape
        return out, groups * layer.group_size
    out, width = layer.weight.shape
    return out, width
