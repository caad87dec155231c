"""How rows of a model can share a batch: found out at load by a self-test of three rows against each alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from rollout_server.engine.kv_cache.mlx_caches import MlxCacheKV
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.padded_layer import Attend
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.store import Forward, KVStore, Reading
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.attention.binding import bound, modules_of
from rollout_server.engine.model.attention.choice import UNBOUND, ChosenAttention, choose_attention
from rollout_server.engine.model.compiled import CompiledDecode, Unrouted
from rollout_server.engine.model.embedding import UNFIT
from rollout_server.engine.sight.seen import Seen
from rollout_server.errors import EngineUnavailable

log = logging.getLogger("rollout_server.engine.model")

SELF_TEST_LENGTHS = (3, 9, 6)


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


def choose_store(module: nn.Module, vocabulary: int, options: EngineOptions, *, compiles: bool) -> ChosenStore:
    """The first kind of cache under which rows of different lengths equal themselves alone. Falls back to one row at a
    time, and says so; decode steps are compiled, and attend by a kernel, only where they then pass the
    same test. Raises `EngineUnavailable` where keys and values are to be kept in 8 bits and cannot be."""
    forward: Reading = lambda tokens, caches, seen=None: module(tokens, cache=caches)  # noqa: E731
    make_caches = lambda: make_prompt_cache(module)  # noqa: E731
    rows = [[(7 * i + 3 * length) % vocabulary for i in range(length)] for length in SELF_TEST_LENGTHS]
    expected = [_alone(forward, module, row) for row in rows]
    packs = options.kv_bits is not None
    problem, windows = "the state of some layers is not columns of keys and values", _windows(module)
    if windows is not None:
        make = partial(PaddedKV, windows)
        found = _choose_padded(forward, make, rows, expected, compiles, packs=packs)
        if isinstance(found, ChosenStore):
            return _with_attention(found, module, rows, expected, wanted=options.attention == "auto")
        problem = found
    if packs:
        raise EngineUnavailable(
            f"This model cannot keep its keys and values in 8 bits ({problem}): leave --kv-bits out."
        )
    if windows is not None:
        log.warning("This model cannot use slot caches (%s).", problem)
    cell, row_cells = _measure_caches(forward, make_caches, vocabulary)
    if (fault := _self_test(forward, MlxCacheKV(make_caches), rows, expected)) is None:
        return ChosenStore("batch", cell, row_cells, lambda _: MlxCacheKV(make_caches, row_cells=row_cells))
    log.warning("Rows of this model cannot share a batch (%s): it is served one row at a time.", fault)
    return ChosenStore("serial", cell, row_cells, lambda _: MlxCacheKV(make_caches, row_cells=row_cells, serial=True))


def _choose_padded(
    forward: Reading,
    make: Callable[..., PaddedKV],
    rows: Sequence[Sequence[int]],
    expected: Sequence[mx.array],
    compiles: bool,
    *,
    packs: bool,
) -> ChosenStore | str:
    """Slot caches, or why not. What is wrong in 8 bits alone shows once the same model has passed without."""
    store = make(len(rows))
    if (problem := _self_test(forward, store, rows, expected)) is not None:
        return problem
    if packs:
        make = partial(make, packs=True)
        store = make(len(rows))
        if (problem := _self_test(forward, store, rows, expected)) is not None:
            return problem
    cell = store.nbytes // (store.capacity * store.columns)
    if compiles:
        store = make(len(rows), coarse=True)
        problem = _self_test(forward, store, rows, expected, CompiledDecode(forward, store, Unrouted()))
        if problem is None:
            return ChosenStore("slots", cell, 0, partial(make, coarse=True), True)
        log.warning("Decode steps of this model cannot be compiled (%s): they run as they are.", problem)
    return ChosenStore("slots", cell, 0, make)


def _with_attention(
    chosen: ChosenStore, module: nn.Module, rows: Sequence[Sequence[int]], expected: Sequence[mx.array], *, wanted: bool
) -> ChosenStore:
    modules = modules_of(module)

    def forward(tokens: mx.array, caches: list[Any], seen: Seen | None = None, /) -> mx.array:
        with bound(modules):
            logits: mx.array = module(tokens, cache=caches)
        return logits

    def trial(attend: Attend, *, traced: bool) -> str | None:
        store = chosen.make(len(rows), attend=attend)
        traced = traced and chosen.compiles
        decode = CompiledDecode(forward, store, Unrouted()) if traced and isinstance(store, PaddedKV) else None
        return _self_test(forward, store, rows, expected, decode)

    found = choose_attention(module, trial, wanted=wanted)
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
        places = [store.seat(prompt, 1, False)[0] for prompt in prompts]
        inputs, offsets = [0] * store.capacity, [None] * store.capacity
        for place, row in zip(places, rows, strict=True):
            inputs[place], offsets[place] = row[-1], len(row) - 1  # type: ignore[call-overload]
        store.set_positions(offsets, longest)
        tokens = mx.array(inputs, dtype=mx.int32)[:, None]
        logits = (decode or forward)(tokens, store.layers)[:, -1].astype(mx.float32)
        mx.eval(logits)
    except UNFIT as error:
        return f"{type(error).__name__}: {error}"
    scale = max(float(mx.max(mx.abs(row))) for row in expected)
    # float32 hardly depends on the batch's shape; the half precisions visibly do, and 8 bits move every number.
    tolerance = 1e-4 * max(1.0, scale) if store_dtype(store) == mx.float32 else 0.05 * max(1.0, scale)
    for index, (place, alone) in enumerate(zip(places, expected, strict=True)):
        gap = float(mx.max(mx.abs(logits[place] - alone)))
        if not gap <= tolerance:
            return f"row {index} of three differs by {gap:.2g} from itself alone"
    return None


def store_dtype(store: KVStore) -> mx.Dtype:
    for layer in store.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None:
            return keys.dtype
    return mx.float32
