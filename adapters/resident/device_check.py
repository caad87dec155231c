"""Checks that this device computes adapters as it should, on a model's own layers, before a version is served on them.

The oracle is plain products of numpy in float64, of some outputs where a layer has very many. A kernel that reads
another row's or another expert's matrix is off by about the size of the values themselves, rounding by a thousandth of
it: the bound lies between the two, for each dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from adapters.kernels.text import own_device
from adapters.resident.layers.embedding import AdaptedEmbedding
from adapters.resident.layers.expert_product import BLOCKS, ExpertLinear, in_blocks
from adapters.resident.layers.experts import EXPERT_LAYERS, SORTED_FROM, AdaptedExperts
from adapters.resident.layers.linear import AdaptedLinear, SummedLinear
from adapters.resident.layers.slot_stack import SlotStack
from adapters.resident.model_layers import CUT_INPUTS, bare_layer, holder
from adapters.spec import TIED_HEAD, ExpertsShape, Place, TiedEmbeddingShape, experts_of, place_of

RANKS = (3, 8)
"""Ranks of the two versions that are tried: one is narrower than the stack that holds it, and one is as wide."""
ROUTES = ((0, 1, 2), (1, 1, 1), (2, 2, 2))
"""Slots of the three rows: all different, which gathers, and all one, which does not."""
LENGTHS = (1, 5, 130)
"""Tokens a row: a decode step, a short chunk and a longer one, since kernels are chosen by it."""
TRIED_ROUTES = tuple((route, length) for length in LENGTHS for route in ROUTES)
TRIED = 4
"""How many experts are tried, of however many there are."""
COMPARED = 4096
"""Outputs up to which all are compared. Of more, as a head has them, the device computes all, and some are compared."""
ENDS, BORDERS, OTHERS = 64, 256, 512
"""How many of them: the first ones and the last ones, pairs on both sides of a multiple of `TILE`, and any others."""
TILE = 128
"""Outputs: what a kernel computes together begins and ends at multiples of it, or of a part of it."""
BOUND: dict[mx.Dtype, float] = {mx.float32: 5e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""‖difference‖ ÷ ‖value‖ of one token's outputs. TF32, in which a GPU may multiply float32, rounds to 5e-4, float16 to
5e-4 and bfloat16 to 4e-3, a few times in a row."""

Array = NDArray[np.float64]


def check_adapters(model: nn.Module, layers: Mapping[str, tuple[int, int]], dtype: mx.Dtype) -> dict[Place, str]:
    """Kind of layer (`place_of`) → what this device computes wrongly there; empty where all is well.

    Tries one layer of each kind, shape and storage of a bare `model`; `layers` is what `adaptable_layers` finds in it,
    or `own_layers` in a part, `dtype` that of its activations. All are tried, whatever is found: ranks sum what
    the part of each gives, so that none of them may leave out what another one waits for."""
    faults: dict[Place, str] = {}
    tried: set[tuple[Any, ...]] = set()
    for path, shape in layers.items():
        place, layer = place_of(shape), layer_at(model, layers, path)
        kind = (place, *shape, *experts_of(shape), type(layer), layer.get("bits"), layer.get("mode"), "bias" in layer)
        if kind in tried:
            continue
        tried.add(kind)
        try:
            fault = _check_experts(model, path, shape, dtype) if place == "experts" else _check(layer, shape, dtype)
        except (RuntimeError, ValueError) as error:
            fault = f"it ends in {type(error).__name__}: {error}"
        if fault is not None:
            faults.setdefault(place, f"in {path} ({shape[0]} × {shape[1]}, {_name(dtype)}): {fault}")
    return faults


def layer_at(model: nn.Module, layers: Mapping[str, tuple[int, int]], path: str) -> nn.Module:
    if path == TIED_HEAD and path in layers and place_of(layers[path]) == "tied_head":
        path = next(other for other, shape in layers.items() if isinstance(shape, TiedEmbeddingShape))
    parent, name = holder(model, path)
    return bare_layer(parent[name])


@dataclass(frozen=True, slots=True, eq=False)
class Versions:
    """A stack with two versions in it, and in float64 what it holds: A, B and gain of every slot, slot 0 the base."""

    stack: SlotStack
    a: tuple[Array, ...]
    b: tuple[Array, ...]
    gain: tuple[Array, ...]

    @classmethod
    def make(cls, shape: tuple[int, int], dtype: mx.Dtype, strength: float, ranks: tuple[int, ...] = RANKS) -> Versions:
        """`strength` is the size of what the layer itself gives for inputs of size one: neither drowns the other."""
        (out, width), experts = shape, experts_of(shape)
        random, stack = np.random.default_rng(out + width), SlotStack(len(ranks) + 1, 0, shape, dtype)
        stack.reserve(len(ranks) + 1, max(ranks))
        a, b, gains = [np.zeros((*experts, 1, width))], [np.zeros((*experts, 1, out))], [np.ones(out)]
        for slot, rank in enumerate(ranks, 1):
            down = mx.array(random.standard_normal((*experts, rank, width)) * width**-0.5).astype(dtype)
            up = mx.array(random.standard_normal((*experts, rank, out)) * strength * rank**-0.5).astype(dtype)
            gain = None if experts or slot == 1 else mx.array(random.uniform(0.5, 1.5, out)).astype(dtype)
            stack.write(slot, down, up, gain)
            a.append(in_float64(down))
            b.append(in_float64(up))
            gains.append(np.ones(out) if gain is None else in_float64(gain))
        mx.eval(stack.arrays())
        return cls(stack, tuple(a), tuple(b), tuple(gains))

    def aim(self, route: tuple[int, ...], rows: mx.array | None = None) -> None:
        """Each row at the slot that the route names; `rows` says the same, where stacks are to share it."""
        if len(set(route)) == 1:
            self.stack.select(route[0], rows)
        else:
            self.stack.aim_rows(frozenset(route), mx.array(route, dtype=mx.uint32) if rows is None else rows)


def _check(layer: nn.Module, shape: tuple[int, int], dtype: mx.Dtype) -> str | None:
    """A linear layer, an embedding or the head that shares its weight, which gives base(x) without an adapter. Says
    what was wrong first."""
    place, random = place_of(shape), np.random.default_rng(shape[0])
    table = place in ("embedding", "tied_embedding")
    base: Callable[[mx.array], mx.array] = layer.as_linear if place == "tied_head" else layer
    some = compared_outputs(shape[0])
    bias = in_float64(layer["bias"])[some] if "bias" in layer else np.zeros(len(some))
    # Every rank tries the same numbers, and their products are summed.
    ranks = layer.group.size() if isinstance(layer, CUT_INPUTS) else 1
    given: tuple[mx.array, Array] | None = None
    versions: Versions | None = None
    said: str | None = None
    for route, length in TRIED_ROUTES:
        rows = len(route), length
        if given is None or given[0].shape[:2] != rows:
            drawn = random.integers(0, shape[1], rows) if table else random.standard_normal((*rows, shape[1]))
            x = mx.array(drawn).astype(mx.int32 if table else dtype)
            given = x, in_float64(base(x)[..., mx.array(some)]) - bias
        x, plain = given
        versions = versions or Versions.make(shape, dtype, size_of(plain))
        adapted = _adapted(layer, versions.stack, place)
        versions.aim(route)
        found = in_float64(adapted(x)[..., mx.array(some)])
        for row, slot in enumerate(route):
            inner = versions.a[slot].T[np.array(x[row])] if table else ranks * in_float64(x[row]) @ versions.a[slot].T
            expected = versions.gain[slot][some] * (plain[row] + inner @ versions.b[slot][:, some]) + bias
            if (fault := difference(found[row], expected, dtype)) is not None:
                said = said or f"{_spoken(route, length)} {fault}"
    return said


def compared_outputs(count: int) -> NDArray[np.int64]:
    """Which of so many outputs are compared, in order."""
    if count <= COMPARED:
        return np.arange(count)
    random = np.random.default_rng(count)
    borders = TILE * random.choice(np.arange(1, count // TILE + 1), min(BORDERS, count // TILE), replace=False)
    ends = np.arange(ENDS), np.arange(count - ENDS, count)
    found = np.unique(np.concatenate([*ends, borders - 1, borders, random.integers(0, count, OTHERS)]))
    return found[found < count]


def _adapted(layer: Any, stack: SlotStack, place: str) -> Callable[[mx.array], mx.array]:
    if place == "linear":
        return SummedLinear(layer, stack) if isinstance(layer, CUT_INPUTS) else AdaptedLinear(layer, stack)
    embedding = AdaptedEmbedding(layer)
    embedding.attach(stack, head=place == "tied_head")
    return embedding.as_linear if place == "tied_head" else embedding


def _check_experts(model: nn.Module, path: str, shape: tuple[int, int], dtype: mx.Dtype) -> str | None:
    """The block around the layer at `path`, with few tokens and with so many that it sorts them by expert; the oracle
    takes each token and choice alone, with the expert's weights unpacked."""
    if not isinstance(shape, ExpertsShape):
        raise ValueError(f"{path} is no stack of experts.")
    parent, key = holder(model, path.rpartition(".")[0])
    block: Any = bare_layer(parent[key])
    layer = path.rpartition(".")[2]
    names = EXPERT_LAYERS[type(block)]
    some = sorted({round(i * (shape.experts - 1) / (TRIED - 1)) for i in range(TRIED)})
    one_of = {expert: {name: _expert(block[name], expert) for name in names} for expert in some}
    size = size_of(np.stack([one_of[expert][layer][0] for expert in some]))
    versions = Versions.make(shape, dtype, size * shape[1] ** 0.5)
    adapted, random = AdaptedExperts(block), np.random.default_rng(shape[0])
    adapted.attach(versions.stack, layer)
    said = _check_blocks(block[layer], {expert: one_of[expert][layer][0] for expert in some}, dtype)
    for length in (2, SORTED_FROM // 4):
        x = mx.array(random.standard_normal((len(ROUTES[0]), length, block[names[0]].input_dims))).astype(dtype)
        choices = np.array(some)[random.integers(0, len(some), (len(ROUTES[0]), length, 2))]
        for route in ROUTES:
            versions.aim(route)
            found = in_float64(adapted(x, mx.array(choices.astype(np.uint32))))
            for row, token, choice in _some_of(choices.shape):
                expert, slot = int(choices[row, token, choice]), route[row]
                low = versions.a[slot][expert], versions.b[slot][expert]
                expected = _one_token(block, one_of[expert], layer, low, in_float64(x[row, token]))
                if (fault := difference(found[row, token, choice], expected, dtype)) is not None:
                    said = said or f"{_spoken(route, length)} {fault}"
    return said


def _check_blocks(layer: nn.Module, weights: Mapping[int, Array], dtype: mx.Dtype) -> str | None:
    """The product of choices in order, in blocks of every size, on the device that takes it for many tokens."""
    if type(layer) is not ExpertLinear or own_device() != "cuda":
        return None
    random = np.random.default_rng(len(weights))
    for rows in BLOCKS:
        chosen = np.sort(random.choice(list(weights), 2 * rows + 5)).astype(np.uint32)
        x = mx.array(random.standard_normal((len(chosen), 1, layer.input_dims))).astype(dtype)
        found = in_float64(in_blocks(x, layer["weight"].swapaxes(-1, -2), mx.array(chosen), rows))
        for at, expert in enumerate(chosen.tolist()):
            if (fault := difference(found[at, 0], weights[expert] @ in_float64(x[at, 0]), dtype)) is not None:
                return f"for choices in blocks of {rows} {fault}"
    return None


def _some_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Every row's first and last token, with both choices."""
    rows, tokens, choices = shape
    return ((row, token, choice) for row in range(rows) for token in (0, tokens - 1) for choice in range(choices))


def _one_token(
    block: Any, weights: Mapping[str, tuple[Array, Array]], adapted: str, low: tuple[Array, Array], x: Array
) -> Array:
    """What one expert makes of one token x [in], with A and B in `low` on the layer called `adapted`."""

    def layer(name: str, x: Array) -> Array:
        weight, bias = weights[name]
        y = weight @ x + bias
        return y + (low[0] @ x) @ low[1] if name == adapted else y

    def single(x: Array) -> mx.array:
        return mx.array(x.astype(np.float32))

    *into, back = EXPERT_LAYERS[type(block)]
    return layer(back, in_float64(block.activation(*(single(layer(name, x)) for name in into))))


def _expert(layer: Any, expert: int) -> tuple[Array, Array]:
    """One expert's weight [out, in], unpacked, and its bias [out]."""
    weight = layer["weight"][expert]
    if "scales" in layer:
        biases, scale = layer.get("biases"), layer.get("global_scale")
        weight = mx.dequantize(
            weight,
            layer["scales"][expert],
            None if biases is None else biases[expert],
            layer.group_size,
            layer.bits,
            layer.mode,
            None if scale is None else scale[expert],
            dtype=mx.float32,
        )
    return in_float64(weight), in_float64(layer["bias"][expert]) if "bias" in layer else np.zeros(weight.shape[0])


def difference(found: Array, expected: Array, dtype: mx.Dtype) -> str | None:
    """What is wrong with outputs [..., out], token by token; None if they are within `BOUND`."""
    gap = np.linalg.norm(found - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)
    worst = float(np.max(gap)) if np.isfinite(gap).all() else float("nan")
    if worst <= BOUND[dtype]:
        return None
    return f"is {worst:.2g} of its size away from plain products, where rounding explains {BOUND[dtype]:g}"


def _spoken(route: tuple[int, ...], length: int) -> str:
    rows = "rows of one version" if len(set(route)) == 1 else "rows of several versions"
    return f"the output for {rows}, {length} {'token' if length == 1 else 'tokens'} each,"


def in_float64(values: mx.array) -> Array:
    return np.array(values.astype(mx.float32), dtype=np.float64)


def size_of(values: Array) -> float:
    """Root mean square; one where all is zero."""
    return float(np.sqrt(np.mean(values**2))) or 1.0


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
