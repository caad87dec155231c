"""Chooses whether a kernel attends in this model's decode steps on this device: only where it gives what plain
operations give, for every kind of layer that the model has, and takes less time than the model's own attention."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.kv_cache.eight_bit import Packing
from rollout_server.engine.kv_cache.padded_layer import Attend, DecodeAttention
from rollout_server.engine.model.attention.kernel import FILLED, LEAST_PART, geometry_of, row_kernel
from rollout_server.engine.model.attention.plain import attend_plainly
from rollout_server.engine.model.embedding import UNFIT
from rollout_server.engine.model.forward.functions import modules_of

log = logging.getLogger("rollout_server.engine.model")

Agreed = Callable[[str | None], str | None]
"""What this process found wrong → what is taken to be wrong, by all ranks alike."""

TESTED_COLUMNS = 4 * LEAST_PART
TIMED_ROWS, TIMED_COLUMNS = 64, 512
REPEATS = 5


def by_itself(fault: str | None) -> str | None:
    """The `Agreed` of an engine without ranks."""
    return fault


class Trial(Protocol):
    def __call__(self, attend: Attend, *, traced: bool) -> str | None:
        """Runs rows of the model under an attention, `traced` where the model's steps are; says what is wrong with
        them."""


@dataclass(frozen=True, slots=True, eq=False)
class ChosenAttention:
    """`attend` is None where the model's own attention stays; `reason` says why it is as it is, as a half sentence."""

    attend: Attend | None
    modules: tuple[ModuleType, ...]
    """Those whose names are bound in forwards, for `attend` or for what a CPU does faster: see `forward.functions`."""
    reason: str


UNBOUND = ChosenAttention(None, (), "this model's state is not columns")


def choose_attention(module: nn.Module, trial: Trial, *, wanted: bool, agreed: Agreed = by_itself) -> ChosenAttention:
    """`trial` runs the model's own rows, on all ranks together where there are several; `agreed` is what any of them
    found. Whatever goes wrong leaves the model as it is."""
    kernel = row_kernel() if wanted else None
    if kernel is None:
        return ChosenAttention(None, (), "no kernel is written for this device" if wanted else "it was asked for")
    reason = _why_not(kernel, trial, agreed)
    if reason is not None:
        log.warning("Decode steps keep mlx's own attention: %s.", reason)
        return ChosenAttention(None, (), reason)
    return ChosenAttention(kernel, modules_of(module), "every row reads its own columns")


def _why_not(kernel: Attend, trial: Trial, agreed: Agreed) -> str | None:
    """Ranks agree after every stage: one that went on alone would wait in the next trial for the others' sums."""
    steps: dict[object, DecodeAttention] = {}

    def noting(step: DecodeAttention) -> tuple[mx.array, mx.array, mx.array]:
        steps.setdefault(geometry_of(step), step)
        return attend_plainly(step)

    def attends() -> str | None:
        if (fault := trial(noting, traced=False)) is not None:
            return f"the model does not attend as its cache expects ({fault})"
        return None if steps else "no layer asks its cache to attend"

    def alike() -> str | None:
        faults = (_compare(kernel, step) for step in steps.values())
        fault = next((fault for fault in faults if fault is not None), None)
        return None if fault is None else f"the kernel computes something else here, {fault}"

    def runs() -> str | None:
        fault = trial(kernel, traced=True)
        return None if fault is None else f"under the kernel {fault}"

    def slower() -> str | None:
        return _slower(kernel, max(steps.values(), key=lambda step: step.window is None))

    faults = (agreed(_found(stage)) for stage in (attends, alike, runs, slower))
    return next((fault for fault in faults if fault is not None), None)


def _found(stage: Callable[[], str | None]) -> str | None:
    try:
        return stage()
    except UNFIT as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _compare(kernel: Attend, like: DecodeAttention) -> str | None:
    """Rows of odd lengths, one free place, and NaN in every column that no row may read."""
    window = like.window or 0
    borders = [column for column in (window - 1, window, window + 1) if 0 < column < TESTED_COLUMNS - 1]
    offsets = [0, 1, 31, LEAST_PART, TESTED_COLUMNS - 2, TESTED_COLUMNS - 1, *borders]
    many = -(-FILLED // (like.keys.shape[1] * len(offsets)))
    # So many that one block reads a row, and so few that several do.
    for places in (offsets * many, offsets[:5], offsets[-1:]):
        step = _made(like, places, TESTED_COLUMNS)
        rows = mx.arange(len(places))
        expected, _, _ = attend_plainly(_twin(step))
        found, keys, values = kernel(step)
        mx.eval(expected, found)
        # What the kernel wrote is read by a later evaluation.
        written = mx.stack([mx.all(a[rows, :, step.offset] == b[:, :, 0], axis=(1, 2)) for a, b in
                            ((keys, step.new_keys), (values, step.new_values))]).all(axis=0)  # fmt: skip
        if not bool(mx.all(written | (step.offset == TESTED_COLUMNS - 1))):
            return "what it should write is not there afterwards"
        gap = float(mx.max(mx.abs(found.astype(mx.float32) - expected.astype(mx.float32))))
        # Values are of order one; both sides round once to the dtype, and sums of float32 differ by their order.
        bound = 4 * mx.finfo(found.dtype).eps + 1e-5
        if not gap <= bound:
            return f"by {gap:.2g} in {geometry_of(step)}"
    return None


def _made(like: DecodeAttention, offsets: Sequence[int], columns: int) -> DecodeAttention:
    """A step of the same kind with random numbers, and NaN where no row reads."""
    _, heads, _, width = like.queries.shape
    rows, kv_heads, dtype = len(offsets), like.keys.shape[1], like.queries.dtype
    key = mx.random.key(7)
    drawn = mx.random.normal((rows, 2 * (columns + 1) * kv_heads + heads, width), key=key).astype(dtype)
    queries = drawn[:, :heads, None]
    kept = drawn[:, heads:].reshape(rows, 2, kv_heads, columns + 1, width)
    offset = mx.array(list(offsets), dtype=mx.int32)
    unread = (mx.arange(columns + 1) > offset[:, None])[:, None, :, None]
    keys, values = (mx.where(unread, mx.nan, kept[:, which]).astype(dtype) for which in (0, 1))
    new_keys, new_values = kept[:, 0, :, -1:], kept[:, 1, :, -1:]
    keys, values = keys[:, :, :columns], values[:, :, :columns]
    if like.packings is not None:
        packings = Packing(width, dtype), Packing(width, dtype)
        # NaN has no code.
        keys, values = packings[0].pack(kept[:, 0, :, :columns]), packings[1].pack(kept[:, 1, :, :columns])
        new_keys, new_values = packings[0].pack(new_keys), packings[1].pack(new_values)
    sinks = None if like.sinks is None else mx.random.normal((heads,), key=key).astype(like.sinks.dtype)
    step = replace(
        like,
        queries=mx.contiguous(queries), new_keys=mx.contiguous(new_keys), new_values=mx.contiguous(new_values),
        keys=mx.contiguous(keys), values=mx.contiguous(values), offset=offset, sinks=sinks,
    )  # fmt: skip
    mx.eval(step.queries, step.new_keys, step.new_values, step.keys, step.values, step.offset)
    return step


def _twin(step: DecodeAttention) -> DecodeAttention:
    """The same step with kept arrays of its own."""
    rows = mx.arange(step.keys.shape[0])
    keys, values = mx.take(step.keys, rows, axis=0), mx.take(step.values, rows, axis=0)
    mx.eval(keys, values)
    return replace(step, keys=keys, values=values)


def _slower(kernel: Attend, like: DecodeAttention) -> str | None:
    """Compares with the model's own attention where rows are as long as the longest: nothing that it could skip."""
    step = _made(like, [TIMED_COLUMNS - 2] * TIMED_ROWS, TIMED_COLUMNS)
    mask = (mx.arange(TIMED_COLUMNS) <= step.offset[:, None])[:, None, None]

    def own() -> mx.array:
        keys, values = step.keys, step.values
        if step.packings is not None:
            keys, values = step.packings[0].unpack(keys), step.packings[1].unpack(values)
        return mx.fast.scaled_dot_product_attention(
            step.queries, keys, values, scale=step.scale, mask=mask, sinks=step.sinks
        )

    mine, theirs = _seconds(lambda: kernel(step)[0]), _seconds(own)
    if mine > theirs:
        return f"the kernel takes {mine * 1e3:.2f} ms where it takes {theirs * 1e3:.2f} ms"
    log.info("Decode steps attend by a kernel: %.2f ms a layer where mlx's own takes %.2f.", mine * 1e3, theirs * 1e3)
    return None


def _seconds(compute: Callable[[], mx.array]) -> float:
    """The fastest of some runs, after one that compiles."""
    taken = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        mx.eval(compute())
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
