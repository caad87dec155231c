"""How rows of a model can share a batch: found out at load by a self-test of three rows against each alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from rollout_server.engine.kv_cache.mlx_caches import PADDED_WIDTH, MlxCacheKV
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.padded_layer import Attend
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.snapshots import Snapshots, arrays_of, compact
from rollout_server.engine.kv_cache.store import Forward, KVStore, Reading, Seating
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.attention.choice import (
    UNBOUND,
    Agreed,
    Choice,
    ChosenAttention,
    by_itself,
    choose_attention,
)
from rollout_server.engine.model.embedding import UNFIT
from rollout_server.engine.model.forward.compiled import CompiledDecode, Unrouted
from rollout_server.engine.model.forward.functions import bound, modules_of
from rollout_server.engine.sampling.numerics import on_cpu
from rollout_server.engine.sight.seen import Seen
from rollout_server.errors import EngineUnavailable

log = logging.getLogger("rollout_server.engine.model")

SELF_TEST_LENGTHS = (3, 9, 6)
PADDED_LENGTHS = (PADDED_WIDTH, 2, PADDED_WIDTH // 2)


@dataclass(frozen=True, slots=True, eq=False)
class ChosenStore:
    kind: str
    cell_bytes: int
    """Per row and column."""
    row_cells: int
    """Columns' worth that a row takes besides."""
    make: Callable[..., KVStore]
    """Empty rows, of which at most so many run."""
    compiles: bool = False
    attention: ChosenAttention = UNBOUND
    fits: Callable[[int], int] = lambda rows: rows
    """How many of so many rows the device takes in a step."""


def choose_store(
    module: nn.Module,
    vocabulary: int,
    options: EngineOptions,
    *,
    compiles: bool,
    agreed: Agreed = by_itself,
    choose: Choice = choose_attention,
) -> ChosenStore:
    """The first kind of cache under which rows of different lengths equal themselves alone. Falls back to one row at a
    time, and says so; decode steps are compiled, and attend by a kernel, only where they then pass the
    same test, on all ranks as `agreed` says. Raises `EngineUnavailable` where keys and values are to be kept in 8 bits
    and cannot be."""
    make_caches = lambda: make_prompt_cache(module)  # noqa: E731
    rows = [[(7 * i + 3 * length) % vocabulary for i in range(length)] for length in SELF_TEST_LENGTHS]
    expected = [_alone(_forward_of(module), module, row) for row in rows]
    modules = _bound_on_cpu(module, rows, expected, agreed) if options.attention == "auto" else ()
    forward = _forward_of(module, modules)
    packs = options.kv_bits is not None
    problem, windows = "the state of some layers is not columns of keys and values", _windows(module)
    if windows is not None:
        make = partial(PaddedKV, windows)

        def test(store: KVStore, decode: Forward | None = None) -> str | None:
            return agreed(_self_test(forward, store, rows, expected, decode))

        found = _choose_padded(forward, make, test, compiles, packs=packs)
        if isinstance(found, ChosenStore):
            choose_own = partial(choose, wanted=options.attention == "auto", agreed=agreed)
            found = _with_attention(found, module, rows, expected, choose_own)
            return found if found.attention.modules else _bound_to(found, modules)
        problem = found
    if packs:
        raise EngineUnavailable(
            f"This model cannot keep its keys and values in 8 bits ({problem}): leave --kv-bits out."
        )
    if windows is not None:
        log.warning("This model cannot use slot caches (%s).", problem)
    cell, row_cells = _measure_caches(forward, make_caches, vocabulary)
    if (lost := agreed(_copies_fault(forward, make_caches, rows, expected))) is not None:
        log.warning("The state of this model cannot be kept for later requests (%s): each prompt is read whole.", lost)
    fault = agreed(_self_test(forward, MlxCacheKV(make_caches), rows, expected))
    if fault is not None:
        log.warning("Rows of this model cannot share a batch (%s): it is served one row at a time.", fault)
    unpadded = fault or _slower_together(module) or agreed(padding_fault(forward, make_caches, vocabulary))
    if fault is None and unpadded is not None:
        log.info("Prompts of this model are read one at a time (%s).", unpadded)
    ways = {"serial": fault is not None, "snapshots": lost is None, "pads": unpadded is None}
    kept = partial(MlxCacheKV, make_caches, row_cells=row_cells, **ways)
    return _bound_to(ChosenStore("batch" if fault is None else "serial", cell, row_cells, lambda _: kept()), modules)


def _forward_of(module: nn.Module, modules: tuple[ModuleType, ...] = ()) -> Reading:
    def forward(tokens: mx.array, caches: list[Any], seen: Seen | None = None, /) -> mx.array:
        with bound(modules):
            logits: mx.array = module(tokens, cache=caches)
        return logits

    return forward


def _bound_to(chosen: ChosenStore, modules: tuple[ModuleType, ...]) -> ChosenStore:
    return replace(chosen, attention=replace(chosen.attention, modules=modules))


def _bound_on_cpu(
    module: nn.Module, rows: Sequence[Sequence[int]], expected: Sequence[mx.array], agreed: Agreed
) -> tuple[ModuleType, ...]:
    """Those whose attention and gate are ours on a CPU; none on other devices, and where the model then says something
    else than it did."""
    if not on_cpu():
        return ()
    modules = modules_of(module)

    def fault() -> str | None:
        forward = _forward_of(module, modules)
        try:
            found = [_alone(forward, module, row) for row in rows]
        except UNFIT as error:
            return f"{type(error).__name__}: {error}"
        return _gap(mx.stack(found), expected, forward(mx.array([[0]]), make_prompt_cache(module)).dtype)

    if (problem := agreed(fault())) is None:
        return modules
    log.warning("Attention and gates of this model stay mlx's own on this CPU: %s.", problem)
    return ()


def _choose_padded(
    forward: Reading,
    make: Callable[..., PaddedKV],
    test: Callable[..., str | None],
    compiles: bool,
    *,
    packs: bool,
) -> ChosenStore | str:
    """Slot caches, or why not. `test` runs the rows in a store, decoded by a forward of its own if one is given. What
    is wrong in 8 bits alone shows once the same model has passed without."""
    rows = len(SELF_TEST_LENGTHS)
    store = make(rows)
    if (problem := test(store)) is not None:
        return problem
    if packs:
        make = partial(make, packs=True)
        store = make(rows)
        if (problem := test(store)) is not None:
            return problem
    cell = store.nbytes // (store.capacity * store.columns)
    if compiles:
        store = make(rows, coarse=True)
        problem = test(store, CompiledDecode(forward, store, Unrouted()))
        if problem is None:
            return ChosenStore("slots", cell, 0, partial(make, coarse=True), True)
        log.warning("Decode steps of this model cannot be compiled (%s): they run as they are.", problem)
    return ChosenStore("slots", cell, 0, make)


def _with_attention(
    chosen: ChosenStore,
    module: nn.Module,
    rows: Sequence[Sequence[int]],
    expected: Sequence[mx.array],
    choose: Callable[..., ChosenAttention],
) -> ChosenStore:
    forward = _forward_of(module, modules_of(module))

    def trial(attend: Attend, *, traced: bool) -> str | None:
        store = chosen.make(len(rows), attend=attend)
        traced = traced and chosen.compiles
        decode = CompiledDecode(forward, store, Unrouted()) if traced and isinstance(store, PaddedKV) else None
        return _self_test(forward, store, rows, expected, decode)

    found = choose(module, trial)
    return replace(chosen, make=partial(chosen.make, attend=found.attend), attention=found)


def _measure_caches(forward: Forward, make_caches: Callable[[], list[Any]], vocabulary: int) -> tuple[int, int]:
    """Bytes per token of mlx-lm's caches, and how many tokens' worth a row costs whatever its length."""
    # KVCache allocates 256 columns at a time.
    sizes = []
    for length in (256, 512):
        caches = make_caches()
        forward(mx.array([[i % vocabulary for i in range(length)]], dtype=mx.int32), caches)
        mx.eval([cache.state for cache in caches])
        sizes.append(sum(cache.nbytes for cache in caches))
    cell = max(1, (sizes[1] - sizes[0]) // 256)
    return cell, max(0, sizes[0] - 256 * cell) // cell


def _windows(module: nn.Module) -> list[int | None] | None:
    """Per layer the sliding window or None; None for the whole if some layer's state is not columns."""
    windows: list[int | None] = []
    for cache in make_prompt_cache(module):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            windows.append(int(cache.max_size))
        else:
            return None
    return windows


def _alone(forward: Forward, module: nn.Module, row: Sequence[int]) -> mx.array:
    """float32 logits [V] after the row, by one plain forward."""
    logits = forward(mx.array([list(row)], dtype=mx.int32), make_prompt_cache(module))[0, -1].astype(mx.float32)
    mx.eval(logits)
    return logits


def _self_test(
    forward: Reading,
    store: KVStore,
    rows: Sequence[Sequence[int]],
    expected: Sequence[mx.array],
    decode: Forward | None = None,
) -> str | None:
    """Prefills all rows but their last token, decodes the last one in a batch, compares with each alone."""
    ignore: Callable[[Sequence[int]], None] = lambda slots: None  # noqa: E731
    longest = max(len(row) for row in rows)
    prompts = [Prompt(tuple(row[:-1]), 0) for row in rows]
    try:
        for prompt in prompts:
            store.begin(prompt, 1, longest)
        store.prefill(forward, [(prompt, len(prompt.tokens)) for prompt in prompts], ignore)
        places = [place for (place,) in store.seat([Seating(prompt, 1) for prompt in prompts])]
        inputs, offsets = [0] * store.capacity, [None] * store.capacity
        for place, row in zip(places, rows, strict=True):
            inputs[place], offsets[place] = row[-1], len(row) - 1  # type: ignore[call-overload]
        store.set_positions(offsets, longest)
        tokens = mx.array(inputs, dtype=mx.int32)[:, None]
        logits = (decode or forward)(tokens, store.layers)[:, -1]
        mx.eval(logits)
    except UNFIT as error:
        return f"{type(error).__name__}: {error}"
    rounded = logits.dtype if logits.dtype != mx.float32 else store_dtype(store)
    return _gap(logits[mx.array(places)].astype(mx.float32), expected, rounded)


def _gap(logits: mx.array, expected: Sequence[mx.array], dtype: mx.Dtype) -> str | None:
    """Which row is not what it is alone, where that is more than what `dtype` rounds away."""
    scale = max(float(mx.max(mx.abs(row))) for row in expected)
    # float32 hardly depends on the batch's shape; the half precisions visibly do, and 8 bits move every number.
    tolerance = 1e-4 * max(1.0, scale) if dtype == mx.float32 else 0.05 * max(1.0, scale)
    for index, (found, alone) in enumerate(zip(logits, expected, strict=True)):
        gap = float(mx.max(mx.abs(found - alone)))
        if not gap <= tolerance:
            return f"row {index} of three differs by {gap:.2g} from itself alone"
    return None


def _slower_together(module: nn.Module) -> str | None:
    """A CPU reads short prompts no faster together in the classes of mlx-lm that were measured, in some at half of the
    speed; in ours, which pad at no cost, faster. `python -m benchmarks.studies.recurrent` says how much."""
    ours = type(module).__module__.startswith("rollout_server.models.recurrent.")
    return "on a CPU that is faster" if mx.default_device() == mx.cpu and not ours else None


def padding_fault(forward: Reading, make_caches: Callable[[], list[Any]], vocabulary: int) -> str | None:
    """Reads a long, a middling and a short prompt together, whole and in two parts, padded with one token and with
    another. Where the class looks at lengths, each leaves the state that it leaves alone, and exactly the same with
    both. States show what logits of half precision hide."""
    rows = [tuple((7 * i + 3 * length) % vocabulary for i in range(length)) for length in PADDED_LENGTHS]
    try:
        expected = [_states(forward, MlxCacheKV(make_caches), [row], 1)[0] for row in rows]
        exact = forward(mx.array([[0]], dtype=mx.int32), make_caches()).dtype == mx.float32
        for parts in (1, 2):
            found = [
                _states(forward, MlxCacheKV(make_caches, pads=True, padding=padding), rows, parts)
                for padding in (0, vocabulary // 2)
            ]
            for one, other, alone in zip(*found, expected, strict=True):
                if not all(bool(mx.array_equal(*pair)) for pair in zip(one, other, strict=True)):
                    return "what pads a prompt changes it"
                if not all(_alike(*pair, exact=exact) for pair in zip(one, alone, strict=True)):
                    return "a prompt that is padded leaves another state"
    except UNFIT as error:
        return f"{type(error).__name__}: {error}"
    return None


def _states(forward: Reading, store: MlxCacheKV, rows: Sequence[tuple[int, ...]], parts: int) -> list[list[mx.array]]:
    """What each row leaves behind in its caches, read in so many parts."""
    prompts = [Prompt(row, 0) for row in rows]
    for prompt in prompts:
        store.begin(prompt, 1, len(prompt.tokens))
    for left in range(parts, 0, -1):
        store.prefill(forward, [(p, (len(p.tokens) - p.prefilled) // left) for p in prompts], lambda slots: None)
    return [arrays_of([compact(cache) for cache in prompt.kept or ()]) for prompt in prompts]


def _alike(found: mx.array, expected: mx.array, *, exact: bool) -> bool:
    """With `exact`, the model computes in float32."""
    if not mx.issubdtype(expected.dtype, mx.floating):
        return bool(mx.array_equal(found, expected))
    gap, scale = mx.max(mx.abs(found - expected)), mx.max(mx.abs(expected))
    return bool(gap <= (1e-4 if exact else 0.05) * scale)


def _copies_fault(
    forward: Forward,
    make_caches: Callable[[], list[Any]],
    rows: Sequence[Sequence[int]],
    expected: Sequence[mx.array],
) -> str | None:
    """Keeps the state behind half of each row, reads something else on, and then the rest of the row, twice, from what
    was kept: where that is not the row alone, state is elsewhere too, or what was given away is written to."""
    snapshots, ends, dtype = Snapshots(), [], mx.float32
    snapshots.fit(sys.maxsize)
    try:
        for row in rows:
            caches, half = make_caches(), len(row) // 2
            forward(mx.array([row[:half]], dtype=mx.int32), caches)
            snapshots.insert((), tuple(row[:half]), lambda caches=caches: caches)  # type: ignore[misc]
            mx.eval(forward(mx.array([row[::-1]], dtype=mx.int32), caches))
            for _ in range(2):
                again = snapshots.find((), tuple(row)).caches or []
                end = forward(mx.array([row[half:]], dtype=mx.int32), again)[0, -1]
                mx.eval(end)
                ends.append(end.astype(mx.float32))
                dtype = end.dtype
    except UNFIT as error:
        return f"{type(error).__name__}: {error}"
    return _gap(mx.stack(ends[::2]), expected, dtype) or _gap(mx.stack(ends[1::2]), expected, dtype)


def store_dtype(store: KVStore) -> mx.Dtype:
    for layer in store.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None:
            return keys.dtype
    return mx.float32
