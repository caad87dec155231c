"""Measures what a decode step costs: the pass over the weights and each attended column, on stores of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.store import Forward
from rollout_server.engine.lengths import StepCosts

ROWS = 4
REPEATS = 3
NARROW = 32
ENOUGH_S = 0.25
"""At one width, after which nothing is repeated: a server that starts waits for it."""


def measure(
    forward: Forward, make_rows: Callable[[], PaddedKV], route: Callable[[Sequence[int]], None], width: int
) -> StepCosts:
    """Fills at most `ROWS` × (`width` + 32) columns meanwhile. `width` is large enough for attending to show."""
    rows = make_rows()
    rows.begin(Prompt((), 0), ROWS, width)
    wide, narrow = _seconds(forward, rows, route, width), _seconds(forward, rows, route, NARROW)
    rows = make_rows()
    rows.begin(Prompt((), 0), 1, NARROW)
    alone = _seconds(forward, rows, route, NARROW)
    # A pass for one row is a little more than for none, so classes are opened a little late.
    return StepCosts(alone, max(0.0, wide - narrow) / (ROWS * (width - NARROW)))


def _seconds(forward: Forward, rows: PaddedKV, route: Callable[[Sequence[int]], None], width: int) -> float:
    """The fastest of some decode steps at this width, after one to warm up."""
    tokens = mx.zeros((rows.capacity, 1), dtype=mx.int32)
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) <= REPEATS and sum(taken) < ENOUGH_S):
        rows.set_positions([width - 1] * rows.capacity, width)
        route([0] * rows.capacity)
        mx.synchronize()
        began = time.perf_counter()
        mx.eval(forward(tokens, rows.layers)[:, -1], rows.arrays())
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
