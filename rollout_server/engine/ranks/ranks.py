"""The ranks of one engine, as each of them sees the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np

from rollout_server.engine.ranks.digest import TurnDigest

T = TypeVar("T", bound=str)


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

    def union(self, own: Mapping[T, str], known: Sequence[T]) -> dict[T, str]:
        """What any rank says of some of the `known`, on every rank: in its own words, and of what only another one has
        found, which one that is."""
        found = self.every(mx.array([name in own for name in known], dtype=mx.int32))
        said = {name: int(np.argmax(column)) for name, column in zip(known, found.T, strict=True) if column.any()}
        return {name: own.get(name, f"as rank {rank} found, whose log says how") for name, rank in said.items()}

    def agreed(self, fault: str | None) -> str | None:
        """What any rank found wrong, on every rank."""
        return self.union({} if fault is None else {"": fault}, ("",)).get("")

    def every(self, values: mx.array) -> np.ndarray:
        """What each rank gives, [ranks, …] on the host."""
        return np.array(mx.distributed.all_gather(values[None], group=self.group))
