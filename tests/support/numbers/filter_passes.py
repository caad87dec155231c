"""The passes of `filter_kernel`, one after the other in numpy: the same digits, the same integers, no threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

PASSES = ((19, 11), (9, 10), (0, 9))
"""Where the digits of a pass begin, and how many bits they have."""
ONE = 0x3F800000
GROUP = 32
Bits = np.ndarray


class FilterPasses:
    """Called as the kernel is."""

    def __call__(self, *, inputs: Sequence[mx.array], **_: Any) -> list[mx.array]:
        weights, limits = (np.array(array) for array in inputs)
        found = [
            filter_row(row, *(int(limit) for limit in each[:3])) for row, each in zip(weights, limits, strict=False)
        ]
        kept, least = (np.array(column, dtype=np.uint32) for column in zip(*found, strict=True))
        return [mx.array(kept), mx.array(least[:, None])]


def filter_row(bits: Bits, rank: int, share: int, floor: int) -> tuple[Bits, int]:
    """What is left of one row, as bits, and the smallest that stays."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    keys = np.where(nan, ONE, np.where(bits >> 31, 0, np.minimum(bits, ONE))).astype(np.uint64)
    edge = search(keys, np.ones_like(keys), rank, None) if rank else 0
    if share:
        above = keys[keys >= edge]
        edge = max(edge, search(above, masses_of(above), None, share))
        edge = ONE if nan.any() else edge
    edge = max(edge, floor)
    return np.where(nan | (bits >= edge), bits, 0), edge


def masses_of(keys: Bits) -> Bits:
    below = np.uint64(127) - (keys >> np.uint64(23))
    mantissa = (keys & np.uint64(0x7FFFFF)) | np.uint64(0x800000)
    return (mantissa << np.uint64(21)) >> np.minimum(below, np.uint64(63))


def search(keys: Bits, amounts: Bits, rank: int | None, share: int | None) -> int:
    """The largest key down to which the amounts come to `rank`, or to that share of all; 0 if they never do."""
    keys, amounts = keys[keys > 0], amounts[keys > 0]
    prefix = above = goal = 0
    for shift, width in PASSES:
        inside = keys >> np.uint64(shift + width) == prefix
        digits = keys[inside] >> np.uint64(shift) & np.uint64((1 << width) - 1)
        tally = np.zeros(1 << width, dtype=np.uint64)
        np.add.at(tally, digits, amounts[inside])
        groups = tally.reshape(-1, GROUP).sum(axis=1)
        if shift + width == 30:
            total = int(groups.sum())
            goal = rank if rank is not None else -(-total * (share or 0) >> 32)
            if total < goal or goal == 0:
                return 0
        group = len(groups) - 1
        while group > 0 and above + int(groups[group]) < goal:
            above += int(groups[group])
            group -= 1
        digit = group * GROUP + GROUP - 1
        while digit > group * GROUP and above + int(tally[digit]) < goal:
            above += int(tally[digit])
            digit -= 1
        prefix = prefix << width | digit
    return prefix
