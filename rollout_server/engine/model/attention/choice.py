"""Chooses whether a kernel attends in this model's decode steps on this device: only where it gives what plain
operations give, for every kind of layer that the model has, and takes less time than the model's own attention."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from rollout_server.engine.kv_cache.padded_layer import Attend, DecodeAttention
from rollout_server.engine.model.attention.kernel import FILLED, LEAST_PART, geometry_of, row_kernel
from rollout_server.engine.model.attention.plain import attend_plainly
from rollout_server.engine.model.embedding import UNFIT
from rollout_server.engine.model.forward.functions import modules_of
from rollout_server.machine.this_device import device_memory

log = logging.getLogger("rollout_server.engine.model")

Agreed = Callable[[str | None], str | None]
"""What this process found wrong → what is taken to be wrong, by all ranks alike."""

TESTED_COLUMNS = 4 * LEAST_PART
BEYOND = LEAST_PART
"""Columns that the longest row goes on behind a window."""
MOST_NUMBERS, SHARE = 2**28, 128
"""Numbers of keys in one trial, and as many of values: half a gigabyte each in half precision, drawn in float32 before.
Where the device has less memory, one number for so many bytes of it, a single row apart: an eighth of the memory."""
AT_ONCE = 2**26
"""Products of queries and keys that plain operations have in memory at once, unless one row's are more."""
TIMED_ROWS, TIMED_COLUMNS = 64, 512
REPEATS = 5
BY_ROW = ("queries", "new_keys", "new_values", "keys", "values", "offset")
"""Fields of a step that begin with its rows."""
NAN_WORD = 0x7FC00000
"""Words of a packed vector that is NaN: its scales and its offsets are."""


def by_itself(fault: str | None) -> str | None:
    """The `Agreed` of an engine without ranks."""
    return fault


class Trial(Protocol):
    def __call__(self, attend: Attend, *, traced: bool) -> str | None:
        """Runs rows of the model under an attention, `traced` where the model's steps are; says what is wrong with
        them."""


@dataclass(frozen=True, slots=True, eq=False)
class ChosenAttention:
    """`attend` is None where the model's own attention stays. The log says why."""

    attend: Attend | None
    modules: tuple[ModuleType, ...]
    """Those whose names are bound in forwards, for `attend` or for what a CPU does faster: see `forward.functions`."""


UNBOUND = ChosenAttention(None, ())


class Choice(Protocol):
    def __call__(self, module: nn.Module, trial: Trial, *, wanted: bool, agreed: Agreed) -> ChosenAttention:
        """See `choose_attention`."""


def choose_attention(module: nn.Module, trial: Trial, *, wanted: bool, agreed: Agreed = by_itself) -> ChosenAttention:
    """The kernel for this device, where it is `wanted` and `proven`; nothing on a CPU, which has none."""
    kernel = row_kernel() if wanted else None
    return UNBOUND if kernel is None else proven(kernel, module, trial, agreed)


def proven(
    kernel: Attend,
    module: nn.Module,
    trial: Trial,
    agreed: Agreed = by_itself,
    clock: Callable[[], float] = time.perf_counter,
) -> ChosenAttention:
    """The kernel, if all that it is asked here comes out right and sooner. `trial` runs the model's own rows, on all
    ranks together where there are several; `agreed` is what any of them found. Whatever goes wrong leaves the model as
    it is, and the log says what did. `clock` is in seconds."""
    reason = _why_not(kernel, trial, agreed, clock)
    if reason is not None:
        log.warning("Decode steps keep mlx's own attention: %s.", reason)
        return UNBOUND
    return ChosenAttention(kernel, modules_of(module))


def _why_not(kernel: Attend, trial: Trial, agreed: Agreed, clock: Callable[[], float]) -> str | None:
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
        mx.clear_cache()  # Nothing else needs arrays as large as those of a wide window.
        return None if fault is None else f"the kernel computes something else here, {fault}"

    def runs() -> str | None:
        fault = trial(kernel, traced=True)
        return None if fault is None else f"under the kernel {fault}"

    def slower() -> str | None:
        return _slower(kernel, max(steps.values(), key=lambda step: step.window is None), clock)

    faults = (agreed(_found(stage)) for stage in (attends, alike, runs, slower))
    return next((fault for fault in faults if fault is not None), None)


def _found(stage: Callable[[], str | None]) -> str | None:
    try:
        return stage()
    except UNFIT as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _compare(kernel: Attend, like: DecodeAttention) -> str | None:
    """What the kernel makes of rows of odd lengths, with one free place among them, and NaN in every column that no row
    may read, against plain operations."""
    for places, columns in trials_of(like, min(MOST_NUMBERS, device_memory() // SHARE)):
        step = _made(like, places, columns)
        rows = mx.arange(len(places))
        # Before the kernel writes into what both read.
        expected = _plainly(step)
        found, keys, values = kernel(step)
        mx.eval(found)
        # What the kernel wrote is read by a later evaluation.
        written = mx.stack([mx.all(a[rows, :, step.offset] == b[:, :, 0], axis=(1, 2)) for a, b in
                            ((keys, step.new_keys), (values, step.new_values))]).all(axis=0)  # fmt: skip
        if not bool(mx.all(written | (step.offset == columns - 1))):
            return "what it should write is not there afterwards"
        gap = float(mx.max(mx.abs(found.astype(mx.float32) - expected.astype(mx.float32))))
        # Values are of order one; both sides round once to the dtype, and sums of float32 differ by their order.
        bound = 4 * mx.finfo(found.dtype).eps + 1e-5
        if not gap <= bound:
            return f"by {gap:.2g} in {geometry_of(step)}"
    return None


def trials_of(like: DecodeAttention, most: int = MOST_NUMBERS) -> Iterator[tuple[list[int], int]]:
    """For each trial the column of every row's new token, and how many columns there are. So few rows that several
    blocks read one, and then so many that one block does.

    Rows end on both sides of a window's border, wherever that is. Of those that reach behind a wide one no trial has
    more than `most` numbers of keys, but for a single row: one block reads such a row only where so many fit."""
    geometry, window = geometry_of(like), like.window or 0
    filled = FILLED // (2 * geometry.kv_heads * geometry.chunks) + 1
    borders = [column for column in (window - 1, window, window + 1) if window and column >= 0]
    columns, reach = TESTED_COLUMNS, window + 1 + BEYOND
    wide = reach > columns - 2
    ends = [0, 1, 31, LEAST_PART, columns - 2, columns - 1, *([] if wide else borders)]
    yield [columns - 2], columns
    yield ends, columns
    if wide:
        ends_behind = [*borders, reach, reach + 1]
        fit = most // (geometry.kv_heads * (reach + 2) * geometry.width)
        yield [reach], reach + 2
        for some in [ends_behind] if fit >= len(ends_behind) else [[end] for end in ends_behind]:
            yield some, reach + 2
        if len(ends_behind) < filled <= fit:
            yield _repeated(ends_behind, filled), reach + 2
    yield _repeated(ends, max(filled, len(ends))), columns


def _repeated(ends: list[int], rows: int) -> list[int]:
    return (ends * -(-rows // len(ends)))[:rows]


def _made(like: DecodeAttention, offsets: Sequence[int], columns: int) -> DecodeAttention:
    """A step of the same kind with random numbers, and NaN where no row reads. For one query head of each key head
    the oldest column that a row reads weighs about a third of all: left out, one of thousands is lost in rounding."""
    _, heads, _, width = like.queries.shape
    rows, kv_heads, dtype = len(offsets), like.keys.shape[1], like.queries.dtype
    offset = mx.array(list(offsets), dtype=mx.int32)
    oldest = mx.maximum(offset + 1 - (like.window or columns), 0)
    own = [mx.random.key(seed) for seed in range(4)]
    queries = mx.random.normal((rows, heads, 1, width), key=own[0]).astype(dtype)
    some = queries[:, :: heads // kv_heads, 0].astype(mx.float32)
    loud = some * (math.log(columns) / (like.scale * mx.sum(some * some, axis=-1, keepdims=True)))
    column = mx.arange(columns)
    unread = ((column >= offset[:, None]) | (column < oldest[:, None]))[:, None, :, None]
    made = []
    for which, packing in enumerate(like.packings or (None, None)):
        # In float32 one after the other, and none of it is kept.
        drawn = mx.random.normal((rows, kv_heads, columns + 1, width), key=own[1 + which]).astype(dtype)
        kept, new = drawn[:, :, :columns], drawn[:, :, columns:]
        if which == 0:
            kept[mx.arange(rows), :, oldest] = loud.astype(dtype)
        if packing is None:
            kept = mx.where(unread, mx.array(mx.nan, dtype), kept)
        else:
            new, kept = packing.pack(new), mx.where(unread, mx.array(NAN_WORD, mx.uint32), packing.pack(kept))
        made.append((mx.contiguous(new), mx.contiguous(kept)))
        mx.eval(made[-1])
    (new_keys, keys), (new_values, values) = made
    sinks = None if like.sinks is None else mx.random.normal((heads,), key=own[3]).astype(like.sinks.dtype)
    step = replace(
        like, queries=queries, new_keys=new_keys, new_values=new_values, keys=keys, values=values, offset=offset,
        sinks=sinks,
    )  # fmt: skip
    mx.eval(queries, offset)
    return step


def _plainly(step: DecodeAttention) -> mx.array:
    """What plain operations attend to, some rows at a time. Leaves the step as it is."""
    rows, columns = step.keys.shape[0], step.keys.shape[2]
    fit = max(1, AT_ONCE // (step.queries.shape[1] * columns * step.queries.shape[3]))
    found = []
    for at in range(0, rows, fit):
        some = {name: getattr(step, name)[at : at + fit] for name in BY_ROW}
        found.append(attend_plainly(replace(step, **some))[0])
        mx.eval(found[-1])
    return mx.concatenate(found)


def _slower(kernel: Attend, like: DecodeAttention, clock: Callable[[], float]) -> str | None:
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

    mine, theirs = _seconds(lambda: kernel(step)[0], clock), _seconds(own, clock)
    if mine >= theirs:
        return f"the kernel takes {mine * 1e3:.2f} ms where it takes {theirs * 1e3:.2f} ms"
    log.info("Decode steps attend by a kernel: %.2f ms a layer where mlx's own takes %.2f.", mine * 1e3, theirs * 1e3)
    return None


def _seconds(compute: Callable[[], mx.array], clock: Callable[[], float]) -> float:
    """The fastest of some runs, after one that compiles."""
    taken = []
    for _ in range(REPEATS + 1):
        began = clock()
        mx.eval(compute())
        taken.append(clock() - began)
    return min(taken[1:])
