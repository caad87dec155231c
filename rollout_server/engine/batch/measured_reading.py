"""What reading chunks of several lengths costs on this device, measured before there is anybody who waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.prompt import Prompt
from rollout_server.engine.kv_cache.sizes import planned
from rollout_server.engine.kv_cache.store import Piece, Reading

FIRST, GROWTH, LONGEST = 8, 16, 2048
"""Tokens of the shortest chunk, each next one's multiple of it, and what none exceeds."""
REPEATS = 2
ENOUGH_S = 0.5
"""After which no longer chunk is tried: a server that starts waits for it."""


def cells_of(most: int) -> int:
    """Columns that measuring fills at most."""
    return 2 * min(most, LONGEST)


def readings(
    forward: Reading,
    make_rows: Callable[[], PaddedKV],
    route: Callable[[Sequence[int]], None],
    most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[int, float]]:
    """(tokens, seconds by `clock`) of chunks of at most `most` tokens in one place: the fastest of `REPEATS` forwards
    of each length, after one to warm up."""
    rows, found = make_rows(), []
    rows.begin(Prompt((), 0), 1, min(most, LONGEST))
    began, length = clock(), min(FIRST, most)
    while True:
        found.append((length, _seconds(forward, rows, route, length, clock)))
        longer = min(GROWTH * length, planned(most), LONGEST)
        if longer <= length or clock() - began > ENOUGH_S:
            return found
        length = longer


def _seconds(
    forward: Reading, rows: PaddedKV, route: Callable[[Sequence[int]], None], length: int, clock: Callable[[], float]
) -> float:
    taken: list[float] = []
    while len(taken) <= REPEATS and (len(taken) < 2 or sum(taken) < ENOUGH_S / 2):
        began = clock()
        rows.read(forward, [Piece(0, 0, (0,) * length, 0)], route)
        rows.evaluate()
        mx.synchronize()
        taken.append(clock() - began)
    return min(taken[1:])
