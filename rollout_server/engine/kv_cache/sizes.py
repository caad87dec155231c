"""Sizes that occur: buckets of rows and columns, and how much of which prompt one forward reads."""

from __future__ import annotations

from collections.abc import Sequence

from rollout_server.engine.messages.options import KV_BUCKET

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LEAST_COLUMNS, COARSE_BUCKET = 128, 64
"""Columns below which no two numbers of them are worth a shape each, and by which widths differ at least."""
HEADROOM = 64
"""Columns that a row must have room for besides what it fills."""


def row_bucket(rows: int, limit: int) -> int:
    """The number of places allocated for `rows` running rows."""
    for bucket in ROW_BUCKETS:
        if bucket >= rows:
            return min(bucket, max(limit, rows))
    return -(-rows // 512) * 512


def padded(count: int) -> int:
    """The next power of two, or three quarters of one: few distinct shapes, for devices that plan each at first use."""
    power = 1 << max(0, count - 1).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def few_columns(count: int) -> int:
    """The next of the few numbers of columns that arrays have where each is a shape to be compiled for: two an octave,
    and a bucket more for the spare column, so that a power of two of tokens does not take half as much again."""
    return padded(max(count - KV_BUCKET, LEAST_COLUMNS)) + KV_BUCKET


def few_widths(count: int) -> int:
    """The next of the few widths that are read then: four an octave, since each column that is read costs time."""
    step = max(COARSE_BUCKET, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


def plan(lefts: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """(index, tokens) of the prompts to read next, of which `lefts` tokens are unread, first come first served.

    Chunks are padded to the longest, and come to at most `budget` tokens with that. The first prompt always takes
    part; another one only where it fills at least half of the length."""
    waiting = [(index, left) for index, left in enumerate(lefts) if left > 0]
    if not waiting:
        return []
    first, head = waiting[0]
    lengths = {min(left, budget) for left in (head, budget, *(1 << power for power in range(3, budget.bit_length())))}
    best: list[tuple[int, int]] = []
    # Of equal ones the longest, which ends the first prompt soonest.
    for length in sorted(lengths, reverse=True):
        chunks = [(first, min(head, length))]
        most = budget // length
        for index, left in waiting[1:]:
            if len(chunks) >= most:
                break
            if 2 * left >= length:
                chunks.append((index, min(left, length)))
        if sum(count for _, count in chunks) > sum(count for _, count in best):
            best = chunks
    return best


def planned(count: int) -> int:
    """The largest number up to `count` that `padded` leaves as it is."""
    power = 1 << (max(1, count).bit_length() - 1)
    return 3 * power // 2 if power >= 2 and count >= 3 * power // 2 else power
