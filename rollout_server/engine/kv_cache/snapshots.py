"""States of what was read before, for models whose state cannot be cut at a token: a radix tree of tokens, in which
some nodes hold the whole state behind their last token.

A state is found when a later prompt begins with exactly the tokens that it has read; of several the longest. The least
recently found is dropped first, wherever it stands, since each is whole. Trees are apart by what their states were
computed under: another version never meets them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import CacheList, KVCache

from rollout_server.engine.kv_cache.prefix_tree import Key, common

Caches = list[Any]
"""mlx-lm's caches of one sequence, one a layer."""


@dataclass(slots=True, eq=False)
class Node:
    tokens: tuple[int, ...]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    """By their first token."""
    caches: Caches | None = None
    """The state behind its last token; None where tokens part, or where it was dropped."""
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """`caches` have read the first `count` tokens and are the finder's own; None, and 0, where there are none."""

    caches: Caches | None
    count: int
    known: int
    """How many of the tokens were read before, whether or not a state is kept there."""


class Snapshots:
    """It holds nothing before `fit` has said how much it may."""

    def __init__(self) -> None:
        self._roots: dict[Key, Node] = {}
        self._recent: OrderedDict[Node, Key] = OrderedDict()
        """Every node that has a state and the key of its tree, the least recently found first."""
        self.limit = 0
        self.nbytes = 0
        self.hits = self.misses = self.evictions = self.hit_tokens = self.asked_tokens = 0

    def find(self, key: Key, tokens: Sequence[int], least: int = 1, *, count: bool = True) -> Found:
        """The longest state of a beginning of `tokens`, of at least `least`. `count`: a prompt is looked up, and no row
        that comes back."""
        path, known = self._walk(key, tokens)
        kept = ((node, end) for node, end in reversed(path) if node.caches is not None and least <= end <= len(tokens))
        node, end = next(kept, (None, 0))
        if count:
            self._count(len(tokens), end)
        if node is None:
            return Found(None, 0, known)
        self._recent.move_to_end(node)
        return Found(copy.deepcopy(node.caches), end, known)

    def _count(self, asked: int, found: int) -> None:
        self.asked_tokens += asked
        self.hits += found > 0
        self.misses += found == 0
        self.hit_tokens += found

    def insert(self, key: Key, tokens: tuple[int, ...], take: Callable[[], Caches]) -> None:
        """Keeps the state that `take` gives, which has read exactly these tokens, if it is not there and has room. It
        is copied, so that it keeps no larger array alive and no later write reaches it."""
        path, _ = self._walk(key, tokens)
        node, end = path[-1] if path else (None, 0)
        if node is not None and end == len(tokens) and node.caches is not None:
            self._recent.move_to_end(node)
            return
        if not tokens or not self.limit:
            return
        caches = [compact(cache) for cache in take()]
        arrays = arrays_of(caches)
        nbytes = sum(array.nbytes for array in arrays)
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self._evict()
        mx.eval(arrays)
        node = self._node(key, tokens)
        node.caches, node.nbytes = caches, nbytes
        self._recent[node] = key
        self.nbytes += nbytes

    def fit(self, limit: int) -> None:
        """Holds at most `limit` bytes from now on."""
        self.limit = max(0, limit)
        while self.nbytes > self.limit:
            self._evict()

    def drop(self, gone: Callable[[Key], bool]) -> None:
        """Forgets the trees whose keys are `gone`."""
        keys = {key for key in self._roots if gone(key)}
        for node in [node for node, key in self._recent.items() if key in keys]:
            self.nbytes -= node.nbytes
            del self._recent[node]
            # Nodes and their parents know each other: until a collector looks for such circles, the arrays would stay.
            node.caches = None
        for key in keys:
            del self._roots[key]

    def clear(self) -> None:
        self.drop(lambda _: True)

    # ---- the tree ---------------------------------------------------------------------------------------------------

    def _walk(self, key: Key, tokens: Sequence[int]) -> tuple[list[tuple[Node, int]], int]:
        """The nodes whose tokens all agree, and how many tokens there are up to the end of each; and how many tokens
        agree in all, the next node's included."""
        node, at = self._roots.get(key), 0
        path: list[tuple[Node, int]] = []
        while node is not None and at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            count = common(child.tokens, tokens, at)
            at += count
            if count < len(child.tokens):
                break
            path.append((child, at))
            node = child
        return path, at

    def _node(self, key: Key, tokens: tuple[int, ...]) -> Node:
        """The node behind the last of `tokens`, made if there is none."""
        root = self._roots.setdefault(key, Node((), None))
        path, agreed = self._walk(key, tokens)
        node, end = path[-1] if path else (root, 0)
        if agreed > end:
            # Its tokens go on otherwise, or end later: what is common gets a node of its own above it.
            lower = node.children[tokens[end]]
            upper = Node(lower.tokens[: agreed - end], node, {lower.tokens[agreed - end]: lower})
            lower.tokens, lower.parent = lower.tokens[agreed - end :], upper
            node.children[tokens[end]] = upper
            node, end = upper, agreed
        if end < len(tokens):
            longer = Node(tokens[end:], node)
            node.children[tokens[end]] = longer
            return longer
        return node

    def _evict(self) -> None:
        node, key = self._recent.popitem(last=False)
        self.nbytes -= node.nbytes
        self.evictions += 1
        node.caches, node.nbytes = None, 0
        self._prune(node, key)

    def _prune(self, node: Node, key: Key) -> None:
        """Takes away nodes without a state that nothing hangs on, and joins one that a single node hangs on to it."""
        while (parent := node.parent) is not None and node.caches is None and not node.children:
            del parent.children[node.tokens[0]]
            node = parent
        if node.parent is None:
            if not node.children:
                del self._roots[key]
        elif node.caches is None and len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens, child.parent = node.tokens + child.tokens, node.parent
            node.parent.children[child.tokens[0]] = child


def compact(cache: Any) -> Any:
    """A cache of its own with the same content, whose arrays are no larger than that and are still to be computed."""
    if isinstance(cache, CacheList):
        return CacheList(*(compact(each) for each in cache.caches))
    found = copy.copy(cache)
    if isinstance(found, KVCache) and found.keys is not None:
        found.keys, found.values = found.keys_and_values()
    found.state = tree_map(lambda part: mx.contiguous(part) if isinstance(part, mx.array) else part, found.state)
    return found


def arrays_of(caches: Sequence[Any]) -> list[mx.array]:
    leaves: dict[str, Any] = dict(tree_flatten([cache.state for cache in caches]))
    return [leaf for leaf in leaves.values() if isinstance(leaf, mx.array)]
