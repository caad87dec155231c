"""KV of what was read before, for whoever comes with the same beginning: a radix tree of token segments.

Each node holds the KV of its own tokens only, so a group's prompt is there once and every finished row is a branch of
it. Rows that end together are copied together, into one block that their nodes share. Nodes are evicted one by one, the
least recently used first; a node is always more recent than what hangs on it, so the oldest is a leaf. Trees are apart
by what their KV was computed under: another version never meets them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

Pair = tuple[mx.array, mx.array]
"""Keys and values [heads, tokens, head size]."""
Layers = list[Pair | None]
"""One pair a layer; None where a layer keeps no KV of its own."""
Key = tuple[Hashable, ...]
"""What KV was computed under."""


@dataclass(slots=True, eq=False)
class Block:
    """KV that is copied in one go, of which several nodes may have parts: it is there until the last of them goes."""

    layers: Layers = field(default_factory=list)
    """Empty until it is copied, and when nobody needs it any more."""
    nodes: int = 0
    nbytes: int = 0
    """What its nodes had of it when they came."""


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The tokens of a block from `start` to before `end`."""

    block: Block
    start: int
    end: int

    @classmethod
    def of(cls, layers: Layers, count: int) -> Columns:
        """All `count` tokens of layers."""
        return cls(Block(layers), 0, count)

    @property
    def layers(self) -> Layers:
        """Views where they are a part of the block."""
        return [
            None if pair is None else (pair[0][:, self.start : self.end], pair[1][:, self.start : self.end])
            for pair in self.block.layers
        ]

    def copied(self) -> Layers:
        """Arrays of their own, not evaluated."""
        chosen = mx.arange(self.start, self.end, dtype=mx.int32)
        return [
            None if pair is None else (mx.take(pair[0], chosen, axis=1), mx.take(pair[1], chosen, axis=1))
            for pair in self.block.layers
        ]

    def part(self, start: int, end: int) -> Columns:
        return Columns(self.block, self.start + start, self.start + end)


@dataclass(slots=True, eq=False)
class Node:
    tokens: tuple[int, ...]
    columns: Columns
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    """By their first token."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The first `count` tokens of `layers`."""

    layers: Layers
    count: int


class PrefixCache:
    """`token_bytes` is what the KV of a token takes. It holds nothing before `fit` has said how much it may."""

    def __init__(self, token_bytes: int) -> None:
        self._token_bytes = token_bytes
        self._roots: dict[Key, Node] = {}
        self._recent: OrderedDict[Node, Key] = OrderedDict()
        """Every node and the key of its tree, the least recently used first."""
        self.limit = 0
        self.nbytes = 0
        self.hits = self.misses = self.evictions = self.hit_tokens = self.asked_tokens = 0

    def find(self, key: Key, tokens: Sequence[int], least: int = 1, *, count: bool = True) -> list[Segment]:
        """The longest beginning of `tokens` that is there, in order; empty if it has fewer than `least` tokens.
        `count`: a prompt is looked up, and no row that comes back."""
        path = self._walk(key, tokens)
        found = sum(length for _, length in path)
        if count:
            self._count(len(tokens), found if found >= least else 0)
        if found < least:
            return []
        self._touch(path)
        return [Segment(node.columns.layers, length) for node, length in path]

    def _count(self, asked: int, found: int) -> None:
        self.asked_tokens += asked
        self.hits += found > 0
        self.misses += found == 0
        self.hit_tokens += found

    def insert(
        self, key: Key, tokens: tuple[int, ...], copy: Callable[[int, int], Columns], ends: Sequence[int] = ()
    ) -> list[mx.array]:
        """Adds what is not there yet; `copy(start, end)` gives the KV of these tokens, of a block that is no view of
        anything and may be copied after this. A node ends at each of `ends` and at the last token. Returns the arrays
        to evaluate, besides those of blocks that are still to be copied; none if there is no room."""
        path = self._walk(key, tokens)
        at = sum(count for _, count in path)
        if at == len(tokens) or not self._make_room((len(tokens) - at) * self._token_bytes, path):
            self._touch(path)
            return []
        new: list[mx.array] = []
        node = path[-1][0] if path else self._roots.setdefault(key, Node((), Columns.of([], 0), None))
        if path and path[-1][1] < len(node.tokens):
            node = self._split(key, node, path[-1][1], new)
        for end in sorted({end for end in (*ends, len(tokens)) if at < end <= len(tokens)}):
            child = Node(tokens[at:end], copy(at, end), node)
            node.children[tokens[at]] = child
            self._recent[child] = key
            self._hold(child)
            new += arrays_of(child.columns.block.layers)
            node, at = child, end
        self._touch_up(node)
        return new

    def fit(self, limit: int) -> None:
        """Holds at most `limit` bytes from now on."""
        self.limit = max(0, limit)
        while self.nbytes > self.limit:
            self._evict()

    def drop(self, gone: Callable[[Key], bool]) -> None:
        """Forgets the trees whose keys are `gone`."""
        keys = [key for key in self._roots if gone(key)]
        for node in [node for node, key in self._recent.items() if key in keys] if keys else ():
            self._let_go(node.columns.block)
            del self._recent[node]
        for key in keys:
            del self._roots[key]

    def clear(self) -> None:
        self.drop(lambda _: True)

    # ---- the tree ---------------------------------------------------------------------------------------------------

    def _walk(self, key: Key, tokens: Sequence[int]) -> list[tuple[Node, int]]:
        """The nodes along `tokens` and how many tokens of each agree; only the last may agree in part."""
        node, at = self._roots.get(key), 0
        path: list[tuple[Node, int]] = []
        while node is not None and at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            count = common(child.tokens, tokens, at)
            path.append((child, count))
            at += count
            node = child if count == len(child.tokens) else None
        return path

    def _touch(self, path: Sequence[tuple[Node, int]]) -> None:
        for node, _ in reversed(path):
            self._recent.move_to_end(node)

    def _touch_up(self, node: Node) -> None:
        while node.parent is not None:
            self._recent.move_to_end(node)
            node = node.parent

    def _split(self, key: Key, node: Node, at: int, new: list[mx.array]) -> Node:
        """Puts the first `at` tokens of a node into one of their own above it; returns that."""
        parent = node.parent
        if parent is None:
            raise RuntimeError("The root of a prefix tree has no tokens to split.")
        whole = node.columns
        upper = Node(node.tokens[:at], whole.part(0, at), parent)
        node.columns = whole.part(at, len(node.tokens))
        node.tokens, node.parent = node.tokens[at:], upper
        upper.children[node.tokens[0]] = node
        parent.children[upper.tokens[0]] = upper
        self._recent[upper] = key
        if not whole.block.layers or whole.block.nodes > 1:
            whole.block.nodes += 1
            return upper
        # Each half of what was one node's alone has a copy of its own: one is evicted before the other.
        for half in (upper, node):
            half.columns = Columns.of(half.columns.copied(), len(half.tokens))
            self._hold(half)
            new += arrays_of(half.columns.block.layers)
        self._let_go(whole.block)
        return upper

    def _hold(self, node: Node) -> None:
        """Counts what a node has that came."""
        block, nbytes = node.columns.block, len(node.tokens) * self._token_bytes
        block.nodes += 1
        block.nbytes += nbytes
        self.nbytes += nbytes

    def _let_go(self, block: Block) -> None:
        """One node less has a part of it."""
        block.nodes -= 1
        if not block.nodes:
            self.nbytes -= block.nbytes
            block.nbytes = 0
            # A node and its children know each other: else their KV would stay until a collector looks for circles.
            block.layers = []

    def _make_room(self, nbytes: int, path: Sequence[tuple[Node, int]]) -> bool:
        """Evicts until so many bytes are free; never what stands on `path`. False if it cannot."""
        held = {node for node, _ in path}
        if nbytes + sum(block.nbytes for block in {node.columns.block for node in held}) > self.limit:
            return False
        self._touch(path)
        while self.nbytes + nbytes > self.limit:
            if next(iter(self._recent)) in held:
                return False
            self._evict()
        return True

    def _evict(self) -> None:
        node, key = self._recent.popitem(last=False)
        self._let_go(node.columns.block)
        self.evictions += 1
        if node.parent is not None:
            del node.parent.children[node.tokens[0]]
            if node.parent.parent is None and not node.parent.children:
                del self._roots[key]


def arrays_of(layers: Layers) -> list[mx.array]:
    return [array for pair in layers if pair is not None for array in pair]


def common(segment: Sequence[int], tokens: Sequence[int], at: int) -> int:
    """How many tokens of `segment` agree with `tokens` from `at` on."""
    count = min(len(segment), len(tokens) - at)
    if segment[:count] == tokens[at : at + count]:
        return count
    # By halving, since comparing slices does not run in Python: [0, agree) is equal and [0, differ) is not.
    agree, differ = 0, count
    while differ - agree > 1:
        half = (agree + differ) // 2
        if segment[agree:half] == tokens[at + agree : at + half]:
            agree = half
        else:
            differ = half
    return agree
