"""Sizes that KV memory is allocated in."""

from __future__ import annotations

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
HEADROOM = 64
"""Columns that a row must have room for besides what it fills."""


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def row_bucket(rows: int, limit: int) -> int:
    """The number of places allocated for `rows` running rows."""
    for bucket in ROW_BUCKETS:
        if bucket >= rows:
            return min(bucket, max(limit, rows))
    return round_up(rows, 512)
