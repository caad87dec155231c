"""Which rows of very different lengths had better not share a batch, by what a decode step costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.store import Forward

MOST_BUCKETS = 4
WORTH = 0.9
"""The share of its cost that a step must come down to before rows are moved for it."""
HORIZON = 32
"""The number of steps within which moving rows must have paid for itself."""
COPY = 4.0
"""Moving a column costs as much as attending to it so many times."""
MEASURED_WIDTH = 1024
ROWS = 4
REPEATS = 3
NARROW = 32
ENOUGH_S = 0.25
"""At one width, after which nothing is repeated: a server that starts waits for it."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Measured, in seconds: a pass over the weights, and attending to one column in one place."""

    weights: float
    cell: float

    def of(self, places: int, width: int) -> float:
        return self.weights + self.cell * places * width


@dataclass(frozen=True, slots=True)
class Shape:
    """A class as it is: rows, and the columns its longest needs now."""

    rows: int
    width: int


Places = Callable[[int], int]
"""Rows → the places that are computed for them."""


class LengthBuckets:
    """Decides in which bucket of a parameter set rows run, and moves nothing itself. Until `costs` are known there is
    one bucket."""

    def __init__(self, places: Places, costs: StepCosts | None = None) -> None:
        self._places = places
        self.costs = costs

    def choose(self, shapes: Mapping[int, Shape], count: int, width: int) -> int:
        """The bucket that `count` rows of `width` columns join. `shapes` are those that have rows, by number; there is
        at least one."""
        numbers = list(shapes)
        if self.costs is None:
            return numbers[0]
        chosen = cheapest(list(shapes.values()), count, width, self.costs, may_open=True)
        if chosen < len(numbers):
            return numbers[chosen]
        return next(number for number in range(len(numbers) + 1) if number not in shapes)

    def moves(self, widths: Sequence[int], buckets: Sequence[int]) -> list[int]:
        """`widths` are the columns each row needs now, `buckets` where it is; returns where each should be."""
        found = plan(widths, buckets, self.costs, self._places) if self.costs and widths else None
        return list(buckets) if found is None else found


def cheapest(shapes: Sequence[Shape], count: int, width: int, costs: StepCosts, *, may_open: bool) -> int:
    """The class that `count` rows of `width` columns join at the least cost a step; `len(shapes)` for one more, where
    that makes all steps so much cheaper that rows would be moved for it. Places without a row are left out: others
    follow to fill them, as where a batch is forming."""

    def more(shape: Shape) -> float:
        return costs.of(shape.rows + count, max(shape.width, width)) - costs.of(shape.rows, shape.width)

    added = [more(shape) for shape in shapes]
    if may_open and len(shapes) < MOST_BUCKETS:
        now = sum(costs.of(shape.rows, shape.width) for shape in shapes)
        if now + costs.of(count, width) <= WORTH * (now + min(added)):
            return len(shapes)
    return added.index(min(added))


def plan(widths: Sequence[int], classes: Sequence[int], costs: StepCosts, places: Places) -> list[int] | None:
    """`widths` are the columns each row needs now, `classes` where it is. Returns where each should be, with the
    numbers of the classes it keeps the most rows of and new ones after the highest; None to leave all as they are."""
    levels = sorted({_level(width) for width in widths}, reverse=True)
    of_level = {level: [i for i, width in enumerate(widths) if _level(width) == level] for level in levels}
    cuts = _partition([len(of_level[level]) for level in levels], levels, costs, places)
    parts = [[row for level in levels[begin:end] for row in of_level[level]] for begin, end in cuts]
    found = _labelled(parts, classes)
    now, then = _cost(widths, classes, costs, places), _cost(widths, found, costs, places)
    moved = sum(width for width, old, new in zip(widths, classes, found, strict=True) if old != new)
    if then > WORTH * now or (now - then) * HORIZON < COPY * costs.cell * moved:
        return None
    return found


def _level(width: int) -> int:
    """Rounded up to eight levels an octave, and to 32 columns: finer differences are not worth a class."""
    step = max(32, 1 << max(0, width.bit_length() - 4))
    return -(-width // step) * step


def _cost(widths: Sequence[int], classes: Sequence[int], costs: StepCosts, places: Places) -> float:
    rows: dict[int, list[int]] = {}
    for width, number in zip(widths, classes, strict=True):
        rows.setdefault(number, []).append(_level(width))
    return sum(costs.of(places(len(members)), max(members)) for members in rows.values())


def _partition(counts: Sequence[int], levels: Sequence[int], costs: StepCosts, places: Places) -> list[tuple[int, int]]:
    """The cheapest way to cut levels, longest first, into at most `MOST_BUCKETS` runs [begin, end)."""
    size = len(levels)
    before = [0]
    for count in counts:
        before.append(before[-1] + count)
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, []), *[(float("inf"), [])] * size]
    for _ in range(min(MOST_BUCKETS, size)):
        following = list(best)
        for end in range(1, size + 1):
            for begin in range(end):
                cost = best[begin][0] + costs.of(places(before[end] - before[begin]), levels[begin])
                if cost < following[end][0]:
                    following[end] = (cost, [*best[begin][1], (begin, end)])
        best = following
    return best[size][1]


def _labelled(parts: Sequence[Sequence[int]], classes: Sequence[int]) -> list[int]:
    """Numbers for parts: each keeps the number most of its rows have, the largest overlaps first."""
    overlaps: dict[tuple[int, int], int] = {}
    for part, rows in enumerate(parts):
        for row in rows:
            overlaps[part, classes[row]] = overlaps.get((part, classes[row]), 0) + 1
    named: dict[int, int] = {}
    for part, number in sorted(overlaps, key=lambda pair: -overlaps[pair]):
        if part not in named and number not in named.values():
            named[part] = number
    free = max(classes) + 1
    found = [0] * len(classes)
    for part, rows in enumerate(parts):
        if part not in named:
            named[part], free = free, free + 1
        for row in rows:
            found[row] = named[part]
    return found


MEASURED_CELLS = 5 * MEASURED_WIDTH
"""At least what measuring fills."""


def measure(
    forward: Forward,
    make_rows: Callable[[], PaddedKV],
    route: Callable[[Sequence[int]], None],
    width: int,
    clock: Callable[[], float] = time.monotonic,
) -> StepCosts:
    """Fills at most `ROWS` × (`width` + 32) columns meanwhile. `width` is large enough for attending to show."""
    rows = make_rows()
    rows.begin(Prompt((), 0), ROWS, width)
    wide, narrow = (_seconds(forward, rows, route, columns, clock) for columns in (width, NARROW))
    rows = make_rows()
    rows.begin(Prompt((), 0), 1, NARROW)
    alone = _seconds(forward, rows, route, NARROW, clock)
    # A pass for one row is a little more than for none, so classes are opened a little late.
    return StepCosts(alone, max(0.0, wide - narrow) / (ROWS * (width - NARROW)))


def _seconds(
    forward: Forward, rows: PaddedKV, route: Callable[[Sequence[int]], None], width: int, clock: Callable[[], float]
) -> float:
    """The fastest of some decode steps at this width, after one to warm up."""
    tokens = mx.zeros((rows.capacity, 1), dtype=mx.int32)
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) <= REPEATS and sum(taken) < ENOUGH_S):
        rows.set_positions([width - 1] * rows.capacity, width)
        route([0] * rows.capacity)
        mx.synchronize()
        began = clock()
        mx.eval(forward(tokens, rows.layers)[:, -1], rows.arrays())
        taken.append(clock() - began)
    return min(taken[1:])
