"""The tree alone, against a plain list of everything that was inserted."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import pytest

from rollout_server.engine.kv_cache.prefix_tree import Block, Columns, Layers, Pair, PrefixCache, arrays_of, common

TOKEN_BYTES = 2 * 2 * 2 * 4
"""Two layers' keys and values, one head of two float32; the third layer has none of its own."""


def kv(tokens: tuple[int, ...], start: int, end: int) -> Layers:
    """KV that depends on every token before, as a model's does."""
    values = [hash(tokens[: at + 1]) % 1000003 for at in range(start, end)]
    pair = mx.array([[[value % 1000, value // 1000] for value in values]], dtype=mx.float32)
    return [(pair, pair + 1), None, (pair + 2, pair + 3)]


def insert(cache: PrefixCache, key: tuple[str, ...], tokens: tuple[int, ...], *ends: int) -> None:
    mx.eval(cache.insert(key, tokens, lambda start, end: Columns.of(kv(tokens, start, end), end - start), ends))


def read(cache: PrefixCache, key: tuple[str, ...], tokens: tuple[int, ...]) -> int:
    """How much is found; what is found must be right."""
    at = 0
    for segment in cache.find(key, tokens):
        expected = kv(tokens, at, at + segment.count)
        for pair, wanted in zip(segment.layers, expected, strict=True):
            if wanted is None:
                assert pair is None
            else:
                assert pair is not None and pair[0].shape[1] >= segment.count
                assert mx.array_equal(pair[0][:, : segment.count], wanted[0])
                assert mx.array_equal(pair[1][:, : segment.count], wanted[1])
        at += segment.count
    return at


def test_branches_share_their_beginning() -> None:
    cache = PrefixCache(TOKEN_BYTES)
    cache.fit(10**6)
    insert(cache, ("a",), (1, 2, 3))
    insert(cache, ("a",), (1, 2, 3, 4, 5), 3)
    insert(cache, ("a",), (1, 2, 3, 4, 6, 7), 3)
    assert cache.nbytes == (3 + 2 + 2) * TOKEN_BYTES
    assert read(cache, ("a",), (1, 2, 3, 4, 6, 7, 8)) == 6
    assert read(cache, ("a",), (1, 2, 9)) == 2
    assert read(cache, ("a",), (2,)) == 0
    assert read(cache, ("b",), (1, 2, 3)) == 0
    insert(cache, ("a",), (1, 2, 9))
    assert cache.nbytes == 8 * TOKEN_BYTES and read(cache, ("a",), (1, 2, 9)) == 3
    assert read(cache, ("a",), (1, 2, 3, 4, 5)) == 5


@pytest.mark.parametrize("how", ["drop", "clear"])
def test_what_is_forgotten_is_freed_at_once(how: str) -> None:
    """And not when somebody looks for objects that know each other."""
    cache = PrefixCache(TOKEN_BYTES)
    cache.fit(10**6)
    for tokens in ((1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 7), (1, 2, 9)):
        insert(cache, ("a",), tokens, 3)
    found = cache.find(("a",), (1, 2, 3, 4, 5))
    held = [weakref.ref(array) for segment in found for array in arrays_of(segment.layers)]
    del found
    gc.disable()
    try:
        cache.clear() if how == "clear" else cache.drop(lambda key: key == ("a",))
        assert held and {array() for array in held} == {None}
    finally:
        gc.enable()
    assert cache.nbytes == 0 and read(cache, ("a",), (1, 2, 3)) == 0


def test_too_little_in_common_is_a_miss() -> None:
    cache = PrefixCache(TOKEN_BYTES)
    cache.fit(10**6)
    insert(cache, ("a",), (1, 2, 3))
    assert not cache.find(("a",), (1, 2, 5), least=3) and cache.find(("a",), (1, 2, 3), least=3)
    assert (cache.hits, cache.misses, cache.hit_tokens, cache.asked_tokens) == (1, 1, 3, 6)


def test_the_oldest_leaf_goes_first() -> None:
    cache = PrefixCache(TOKEN_BYTES)
    cache.fit(8 * TOKEN_BYTES)
    insert(cache, ("a",), (1, 2, 3, 4))
    insert(cache, ("a",), (1, 2, 3, 4, 5, 6))
    insert(cache, ("a",), (1, 2, 3, 4, 7, 8))
    assert read(cache, ("a",), (1, 2, 3, 4, 5, 6)) == 6
    insert(cache, ("a",), (1, 2, 3, 4, 9, 9))
    assert read(cache, ("a",), (1, 2, 3, 4, 7, 8)) == 4 and read(cache, ("a",), (1, 2, 3, 4, 5, 6)) == 6
    assert cache.evictions == 1
    cache.fit(4 * TOKEN_BYTES)
    assert read(cache, ("a",), (1, 2, 3, 4, 5, 6)) == 4
    insert(cache, ("a",), (1, 2, 3, 4, 5))
    assert cache.nbytes == 4 * TOKEN_BYTES, "what an insertion stands on makes no room for it"
    cache.fit(0)
    assert cache.nbytes == 0 and read(cache, ("a",), (1, 2)) == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_insertions_and_evictions(seed: int) -> None:
    chance = random.Random(seed)
    cache = PrefixCache(TOKEN_BYTES)
    cache.fit(60 * TOKEN_BYTES)
    for _ in range(600):
        key = (chance.choice("ab"),)
        tokens = tuple(chance.randrange(3) for _ in range(chance.randrange(1, 14)))
        match chance.randrange(12):
            case 0:
                cache.fit(chance.randrange(100) * TOKEN_BYTES)
            case 1:
                cache.drop(lambda other, key=key: other == key)  # type: ignore[misc]
                assert read(cache, key, tokens) == 0
            case 2 | 3 | 4 | 5:
                read(cache, key, tokens)
            case _:
                insert(cache, key, tokens, chance.randrange(1, 14))
        nodes = list(cache._recent)
        assert cache.nbytes == sum(node.columns.block.nbytes for node in nodes) <= cache.limit
        assert cache.nbytes == TOKEN_BYTES * sum(len(node.tokens) for node in nodes)
        for at, node in enumerate(nodes):
            assert all(nodes.index(child) < at for child in node.children.values()), "parents are more recent"


class Together:
    """A block that is copied after all its rows were inserted."""

    def __init__(self) -> None:
        self.block = Block()
        self._pieces: list[Layers] = []
        self._count = 0

    def take(self, tokens: tuple[int, ...], start: int, end: int) -> Columns:
        self._pieces.append(kv(tokens, start, end))
        self._count += end - start
        return Columns(self.block, self._count - (end - start), self._count)

    def copy(self) -> None:
        if self.block.nodes:
            first, _, last = zip(*self._pieces, strict=True)
            self.block.layers = [joined(first), None, joined(last)]


def joined(pairs: Sequence[Pair]) -> Pair:
    keys, values = zip(*pairs, strict=True)
    return mx.concatenate(keys, axis=1), mx.concatenate(values, axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_are_copied_together(seed: int) -> None:
    """Blocks that are filled after all their rows were inserted, evicted node by node: what is found is right, and what
    is counted is what the blocks hold that somebody needs."""
    chance = random.Random(seed)
    cache = PrefixCache(TOKEN_BYTES)
    cache.fit(60 * TOKEN_BYTES)
    found = 0
    for _ in range(120):
        together, new = Together(), []
        rows = [
            tuple(chance.randrange(3) for _ in range(chance.randrange(1, 14))) for _ in range(chance.randrange(1, 5))
        ]
        for tokens in rows:
            new += cache.insert(("a",), tokens, partial(together.take, tokens), (chance.randrange(1, 14),))
        together.copy()
        mx.eval(new)
        for tokens in rows:
            found += read(cache, ("a",), tokens)
        if chance.randrange(6) == 0:
            cache.fit(chance.randrange(100) * TOKEN_BYTES)
        blocks = {node.columns.block for node in cache._recent}
        assert cache.nbytes == sum(block.nbytes for block in blocks) <= cache.limit
        assert all(block.layers and block.nodes for block in blocks)
        assert all(sum(node.columns.block is block for node in cache._recent) == block.nodes for block in blocks)
    assert found > 0 and cache.evictions > 0
    held = [weakref.ref(array) for block in blocks for array in arrays_of(block.layers)]
    del blocks, together, new
    cache.clear()
    assert cache.nbytes == 0 and {array() for array in held} <= {None}


def test_common_beginnings_token_by_token() -> None:
    chance = random.Random(0)
    for _ in range(500):
        tokens = tuple(chance.randrange(3) for _ in range(chance.randrange(1, 40)))
        at = chance.randrange(len(tokens))
        segment = [*tokens[at:], 1, 2][: chance.randrange(1, 30)]
        if chance.randrange(3):
            segment[chance.randrange(len(segment))] = chance.randrange(3)
        agree = [a == b for a, b in zip(segment, tokens[at:], strict=False)]
        assert common(tuple(segment), tokens, at) == (agree.index(False) if False in agree else len(agree))
