"""What one forward reads of pictures besides its token ids: vectors in the place of placeholders, rotary positions, and
which tokens see those behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from rollout_server.engine.sight.sight import Sight

View = tuple[Sight | None, int, int]
"""What a row of the forward is part of, the column of its first token, and how many tokens of its own it has."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Vectors for some of the B · N tokens of a forward."""

    at: mx.array
    """int32 [M], row by row."""
    embeddings: mx.array
    """[M, hidden]"""
    deepstack: tuple[mx.array, ...]
    """Each [M, hidden]: number i is added behind layer i."""

    def into(self, embeddings: mx.array) -> mx.array:
        """Token embeddings [B, N, hidden] with those of placeholders replaced."""
        flat = embeddings.reshape(-1, embeddings.shape[-1])
        flat[self.at] = self.embeddings.astype(flat.dtype)
        return flat.reshape(embeddings.shape)

    def behind(self, layer: int, hidden: mx.array) -> mx.array:
        """Hidden states [B, N, hidden] behind a layer, with what the tower adds there."""
        if layer >= len(self.deepstack):
            return hidden
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.at[self.at].add(self.deepstack[layer].astype(flat.dtype)).reshape(hidden.shape)


def seen_of(views: Sequence[View], length: int) -> Seen | None:
    """What rows of `length` columns see; None where no picture is among their tokens."""
    at: list[np.ndarray] = []
    embeddings: list[mx.array] = []
    deepstack: list[tuple[mx.array, ...]] = []
    for row, (sight, begin, count) in enumerate(views):
        if sight is None:
            continue
        for picture, start, stop, columns in sight.shown(begin, count):
            features = sight.look(picture, start == 0)
            at.append(row * length + columns - begin)
            embeddings.append(features.embeddings[start:stop])
            deepstack.append(tuple(each[start:stop] for each in features.deepstack))
    if not at:
        return None
    behind = tuple(mx.concatenate(list(each)) for each in zip(*deepstack, strict=True))
    return Seen(mx.array(np.concatenate(at).astype(np.int32)), mx.concatenate(embeddings), behind)


def rotary_of(views: Sequence[View], length: int) -> mx.array | None:
    """Rotary positions of rows of `length` columns: int32 [B], that of each row's first token where all stand behind
    their pictures, or [3, B, length]; None where they are the columns."""
    if all(sight is None or sight.turns is None for sight, _, _ in views):
        return None
    if all(sight is None or begin >= sight.end for sight, begin, _ in views):
        return mx.array(
            [begin + (sight.delta if sight is not None else 0) for sight, begin, _ in views], dtype=mx.int32
        )
    found = np.empty((3, len(views), length), dtype=np.int32)
    for row, (sight, begin, _) in enumerate(views):
        found[:, row] = np.arange(begin, begin + length) if sight is None else sight.positions(begin, length)
    return mx.array(found)


def blocks_of(views: Sequence[View], length: int) -> mx.array | None:
    """int32 [2, B, length], see `Sight.blocks`; None where every token sees what stands before it."""
    if not any(sight is not None and sight.sees_both_ways and begin < sight.end for sight, begin, _ in views):
        return None
    nothing = np.zeros((2, length), dtype=np.int32)
    found = [nothing if sight is None else sight.blocks(begin, length) for sight, begin, _ in views]
    return mx.array(np.stack(found, axis=1))
