"""The ranks of one engine, as each of them sees the others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from rollout_server.engine.ranks.digest import TurnDigest


class Ranks:
    """Engine thread only: every rank calls everything here in the same order, or all of them wait for ever."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.digest = TurnDigest()

    @property
    def rank(self) -> int:
        return int(self.group.rank())

    @property
    def size(self) -> int:
        return int(self.group.size())

    def agree(self, ids: mx.array) -> mx.array:
        """Rank 0's ids on every rank, lazily. Sums may come out in other last bits on other ranks, and a draw that is
        close may then fall on another token: a row must not be two rows."""
        return mx.distributed.all_sum(ids if self.rank == 0 else mx.zeros_like(ids), group=self.group)

    def least(self, numbers: list[int]) -> list[int]:
        """The least of each number over all ranks."""
        # Halves of 24 bits are exact in every type that a backend takes; numbers are sizes, below 2**48.
        every = self.every(mx.array([[number >> 24, number & 0xFFFFFF] for number in numbers], dtype=mx.int32))
        return [min((int(high) << 24) + int(low) for high, low in of) for of in every.swapaxes(0, 1)]

    def every(self, values: mx.array) -> np.ndarray:
        """What each rank gives, [ranks, …] on the host."""
        return np.array(mx.distributed.all_gather(values[None], group=self.group))
