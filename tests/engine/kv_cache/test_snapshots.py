"""The tree of states equals a dictionary of all beginnings, whatever is inserted, found, dropped and evicted. What is
kept is neither written to nor larger than what it holds."""

from __future__ import annotations

import gc
import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from rollout_server.engine.kv_cache.snapshots import Snapshots, compact

BYTES = 64


def state(number: int) -> list[Any]:
    """A state of `BYTES` bytes that says which one it is."""
    cache = ArraysCache(1)
    cache[0] = mx.full((1, BYTES // 4), number, dtype=mx.int32)
    return [cache]


def number_of(caches: list[Any]) -> int:
    return int(caches[0][0][0, 0])


@pytest.mark.parametrize("seed", range(12))
def test_equals_a_dictionary_of_all_beginnings(seed: int) -> None:
    chance = random.Random(seed)
    most = chance.choice([1, 3, 8, 1000])
    snapshots = Snapshots()
    snapshots.fit(most * BYTES)
    kept: dict[tuple[Any, tuple[int, ...]], int] = {}
    """(Key, tokens) → number, the least recently found first."""
    evicted = 0
    for number in range(300):
        key = chance.choice([("a",), ("b",)])
        tokens = tuple(chance.choice([1, 1, 1, 2]) for _ in range(chance.randrange(1, 9)))
        match chance.choice(["insert", "insert", "find", "find", "find", "drop", "fit"] if number % 7 else ["find"]):
            case "insert":
                snapshots.insert(key, tokens, lambda number=number: state(number))
                kept[key, tokens] = kept.pop((key, tokens), number)
            case "find":
                least = chance.randrange(1, 4)
                found = snapshots.find(key, tokens, least)
                ends = [end for end in range(least, len(tokens) + 1) if (key, tokens[:end]) in kept]
                assert found.count == max(ends, default=0)
                if found.caches is not None:
                    at = key, tokens[: found.count]
                    assert number_of(found.caches) == kept[at]
                    kept[at] = kept.pop(at)
                beginnings = {read[:end] for other, read in kept if other == key for end in range(len(read) + 1)}
                assert found.known == max((e for e in range(len(tokens) + 1) if tokens[:e] in beginnings), default=0)
            case "drop" if chance.random() < 0.1:
                snapshots.drop(lambda other, key=key: other == key)
                kept = {at: value for at, value in kept.items() if at[0] != key}
            case "fit" if chance.random() < 0.2:
                snapshots.fit(2 * BYTES)
                while len(kept) > 2:
                    del kept[next(iter(kept))]
                    evicted += 1
                snapshots.fit(most * BYTES)
        while len(kept) > most:
            del kept[next(iter(kept))]
            evicted += 1
        assert snapshots.nbytes == len(kept) * BYTES
    assert snapshots.evictions == evicted and (evicted > 0 or most == 1000)
    snapshots.clear()
    assert snapshots.nbytes == 0 and snapshots.find(("a",), (1, 1, 1)).caches is None


def test_holds_nothing_before_it_may_and_nothing_that_is_too_large() -> None:
    snapshots = Snapshots()
    snapshots.insert((), (1, 2), lambda: state(1))
    snapshots.fit(BYTES - 1)
    snapshots.insert((), (1, 2), lambda: state(1))
    assert snapshots.nbytes == 0 and snapshots.find((), (1, 2, 3)).known == 0


def filled(cache: Any, columns: int) -> Any:
    keys = mx.random.normal((1, 2, columns, 4))
    cache.update_and_fetch(keys, keys + 1)
    return cache


@pytest.mark.parametrize(
    "make",
    [KVCache, lambda: RotatingKVCache(6), lambda: CacheList(KVCache(), KVCache())],
    ids=["whole", "window", "list"],
)
def test_what_is_found_is_neither_written_nor_written_to(make: Any) -> None:
    """Both who left it and who found it read on."""
    caches = [make()]
    parts = caches[0].caches if isinstance(caches[0], CacheList) else caches
    for part in parts:
        filled(part, 5)
    snapshots = Snapshots()
    snapshots.fit(1 << 20)
    snapshots.insert((), (1, 2, 3), lambda: caches)

    def content(found: list[Any]) -> list[list[float]]:
        own = found[0].caches if isinstance(found[0], CacheList) else found
        return [array.tolist() for part in own for array in part.keys_and_values()]

    before = content(caches)
    for part in parts:
        filled(part, 3)
    found = snapshots.find((), (1, 2, 3)).caches
    assert found is not None and content(found) == before
    for part in found[0].caches if isinstance(found[0], CacheList) else found:
        filled(part, 1)
        filled(part, 2)
    again = snapshots.find((), (1, 2, 3)).caches
    assert again is not None and content(again) == before


def test_what_is_kept_keeps_nothing_larger_alive() -> None:
    """A row's state is a part of the batch's arrays, and mlx-lm allocates keys in steps of 256."""
    cache = ArraysCache(1)
    cache[0] = mx.zeros((64, 1024, 16))
    mx.eval(cache[0])
    keys = filled(KVCache(), 5)
    small, before = [compact(cache.extract(3)), compact(keys)], mx.get_active_memory()
    mx.eval([part.state for part in small])
    assert small[0].nbytes == 1024 * 16 * 4 and small[1].nbytes == 2 * 5 * 8 * 4
    del cache
    mx.synchronize()  # A GPU holds what its work has used until that has ended.
    # An allocation may be rounded up to a page of the device.
    assert before - mx.get_active_memory() > 62 * small[0].nbytes


@pytest.mark.parametrize("forget", ["drop", "clear"])
def test_what_is_forgotten_is_freed_at_once(forget: str) -> None:
    """Not when a collector looks for circles: what is kept knows what it is part of."""
    snapshots, nbytes = Snapshots(), 4 << 20
    snapshots.fit(2 * nbytes)

    def large() -> list[Any]:
        cache = ArraysCache(1)
        cache[0] = mx.zeros((nbytes // 4,), dtype=mx.int32)
        mx.eval(cache[0])
        return [cache]

    gc.collect()
    before, on = mx.get_active_memory(), gc.isenabled()
    gc.disable()
    try:
        snapshots.insert((), (1, 2, 3), large)
        assert mx.get_active_memory() >= before + nbytes
        if forget == "drop":
            snapshots.drop(lambda _: True)
        else:
            snapshots.clear()
        mx.synchronize()  # A GPU holds what its work has used until that has ended.
        assert mx.get_active_memory() < before + nbytes and snapshots.nbytes == 0
    finally:
        if on:
            gc.enable()
