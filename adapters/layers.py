"""A linear layer that adds, row by row, the low-rank product of whichever adapter version each row runs on, and
multiplies by its DoRA gain where it has one."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

RANK_BUCKET = 8
"""Ranks are padded with zeros to a multiple of this, so that few shapes exist and ranks can share a stack."""


class SlotStack:
    """A, B and gain of every slot for one layer, and which of them the next forwards use.

    Deliberately no `nn.Module`: the arrays are no parameters of the model. Nothing but this object may hold them, or
    a write copies the whole stack; `rest` drops the views that routing made.
    """

    __slots__ = ("a", "b", "filled", "gain", "gained", "one_gain", "pair", "row_gains", "rows")

    def __init__(self, slots: int, rank: int, layer: tuple[int, int], dtype: mx.Dtype) -> None:
        out, width = layer
        self.a = mx.zeros((slots, rank, width), dtype)
        """[slots, rank, in], zero where nothing was written."""
        self.b = mx.zeros((slots, rank, out), dtype)
        """[slots, rank, out], scale folded in."""
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
        self.row_gains = False
        """Whether any of `rows` has a gain."""

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.gain is None else self.gain.nbytes)

    def arrays(self) -> list[mx.array]:
        """What writes change, for the caller to evaluate."""
        return [self.a, self.b] if self.gain is None else [self.a, self.b, self.gain]

    def reserve(self, slots: int, rank: int) -> None:
        """Grow to at least this many slots and this rank, keeping what is there. Evaluates, to bound the peak."""
        have_slots, have_rank, _ = self.a.shape
        rank = -(-rank // RANK_BUCKET) * RANK_BUCKET
        if slots <= have_slots and rank <= have_rank:
            return
        pad = [(0, max(slots - have_slots, 0)), (0, max(rank - have_rank, 0)), (0, 0)]
        self.a, self.b = mx.pad(self.a, pad), mx.pad(self.b, pad)
        if self.gain is not None:
            self.gain = mx.pad(self.gain, pad[::2], constant_values=1)
        mx.eval(self.arrays())

    def write(self, slot: int, a: mx.array, b: mx.array, gain: mx.array | None) -> None:
        """Put a [rank, in], b [rank, out] and a gain [out] into a slot. Lazy: the caller evaluates."""
        # Marked first: if the evaluation fails, the next owner of the slot knows that it is not clean.
        rank = self.filled[slot] = a.shape[0]
        self.a[slot, :rank] = a
        self.b[slot, :rank] = b
        if rank < self.a.shape[1]:
            self.a[slot, rank:] = 0
            self.b[slot, rank:] = 0
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
            self.gain = mx.ones((self.b.shape[0], self.b.shape[2]), self.b.dtype)
        self.gained.add(slot)
        self.gain[slot] = gain

    def rest(self) -> None:
        """The layer is the bare base until it is aimed again."""
        self.pair = self.rows = self.one_gain = None
        self.row_gains = False

    def aim(self, slot: int) -> None:
        """Every row uses this slot."""
        self.rest()
        rank = self.filled.get(slot)
        if rank is not None:
            # Cut to the version's own rank, so that its numbers do not depend on what else is staged.
            self.pair = self.a[slot, :rank].T, self.b[slot, :rank]
            if self.gain is not None and slot in self.gained:
                self.one_gain = self.gain[slot]

    def aim_rows(self, slots: frozenset[int], rows: mx.array) -> None:
        """Row i uses slot rows[i]; `slots` is the set of them."""
        self.rest()
        if not slots.isdisjoint(self.filled):
            self.rows = rows
            self.row_gains = not slots.isdisjoint(self.gained)


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
        if stack.pair is not None:
            a, b = stack.pair
            if stack.one_gain is None:
                return base(x) + (x @ a) @ b
            return _with_bias(base, stack.one_gain * (_without_bias(base, x) + (x @ a) @ b))
        if stack.rows is None:
            return base(x)
        added = _gathered(x, stack.a, stack.b, stack.rows)
        if stack.gain is None or not stack.row_gains:
            y = base(x)
            return y + added.reshape(y.shape)
        y = _without_bias(base, x)
        gain = stack.gain[stack.rows][:, None]
        return _with_bias(base, (gain * (y.reshape(added.shape) + added)).reshape(y.shape))


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


def _with_bias(layer: nn.Linear | nn.QuantizedLinear, y: mx.array) -> mx.array:
    return y + layer["bias"] if "bias" in layer else y


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
