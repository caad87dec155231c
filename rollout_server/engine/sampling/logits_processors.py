"""What changes the logits before temperature and filters: penalties, bias, end tokens held back, a mask of tokens.

In this order: repetition, frequency and presence penalty, `logit_bias`, then tokens that may not come. The counts that
penalties need live on the device, because a step is built before the tokens of the one before it are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from rollout_server.engine.sampling.filters import RowSubset, row_subset
from rollout_server.rollout import SamplingParams

Pairs = tuple[mx.array, mx.array]
"""(row, token), int32 each."""


@dataclass(frozen=True, slots=True, eq=False)
class Bans:
    """Tokens held back until a row has sampled enough, one entry for each: int64 [N] on the host."""

    places: np.ndarray
    tokens: np.ndarray
    until: np.ndarray

    def at(self, positions: Sequence[int] | np.ndarray) -> Pairs | None:
        """Those that hold where the row at each place samples token number `positions[place]`."""
        holds = np.asarray(positions)[self.places] < self.until
        if not holds.any():
            return None
        return mx.array(self.places[holds].astype(np.int32)), mx.array(self.tokens[holds].astype(np.int32))


def ends_of(row: SamplingParams, eos: frozenset[int]) -> frozenset[int]:
    """The tokens that end a row; `eos` are the model's end tokens."""
    return frozenset(row.stop_token_ids) | (frozenset() if row.ignore_eos else eos)


def prepare_bans(rows: Sequence[SamplingParams | None], eos: frozenset[int]) -> Bans | None:
    """End tokens and stop tokens of rows with `min_tokens`; None if no row has it. Rows with a grammar hold them back
    in their masks (`grammars.hold_back`)."""
    found = [
        (place, token, row.min_tokens)
        for place, row in enumerate(rows)
        if row is not None and row.min_tokens and row.constraint is None
        for token in sorted(ends_of(row, eos))
    ]
    return Bans(*np.array(found, dtype=np.int64).T) if found else None


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """`logit_bias` of all rows, one entry for each token of each: what `values` [N] is added to."""

    places: mx.array
    tokens: mx.array
    values: mx.array


def prepare_bias(rows: Sequence[SamplingParams | None]) -> Bias | None:
    found = [(place, *_columns(row.logit_bias)) for place, row in enumerate(rows) if row is not None and row.logit_bias]
    if not found:
        return None
    places = np.repeat([place for place, _, _ in found], [len(tokens) for _, tokens, _ in found])
    return Bias(
        mx.array(places.astype(np.int32)),
        mx.array(np.concatenate([tokens for _, tokens, _ in found])),
        mx.array(np.concatenate([values for _, _, values in found])),
    )


@lru_cache(maxsize=128)
def _columns(bias: tuple[tuple[int, float], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and values float32. Kept, because a bias may name the whole vocabulary and rows change often."""
    tokens, values = zip(*bias, strict=True)
    return np.array(tokens, dtype=np.int32), np.array(values, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """Parameters of the rows that are penalised, in order of their places; None where no row has any."""

    repetition: RowSubset
    """1 where it is off."""
    presence: mx.array | None
    frequency: mx.array | None
    repeats: bool
    """True if any row has a repetition penalty."""

    def apply(self, logits: mx.array, seen: mx.array) -> mx.array:
        """float32 [R, V] and what `TokenCounts` holds of the penalised rows → [R, V], an array of its own."""
        theirs = self.repetition.of(logits)
        if self.repeats:
            penalty = self.repetition.values
            # What is above 0 divided, what is below multiplied: choosing value by value costs four times as much.
            repeated = mx.maximum(theirs, 0.0) / penalty + mx.minimum(theirs, 0.0) * penalty
            theirs = mx.where(seen > 0, repeated, theirs)
        if self.frequency is not None:
            theirs = theirs - self.frequency * (seen >> 1)
        if self.presence is not None:
            theirs = theirs - self.presence * (seen > 1)
        return self.repetition.put(logits + 0.0, theirs)


def prepare_penalties(rows: Sequence[SamplingParams | None]) -> Penalties | None:
    chosen = [(place, row) for place, row in enumerate(rows) if row is not None and row.penalised]
    repetition = row_subset(chosen, [row.repetition_penalty for _, row in chosen], len(rows), mx.float32)
    if repetition is None:
        return None

    def column(values: list[float]) -> mx.array | None:
        return mx.array(values, dtype=mx.float32)[:, None] if any(values) else None

    return Penalties(
        repetition=repetition,
        presence=column([row.presence_penalty for _, row in chosen]),
        frequency=column([row.frequency_penalty for _, row in chosen]),
        repeats=any(row.repetition_penalty != 1 for _, row in chosen),
    )


def count_tokens(prompt_ids: Sequence[int], token_ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """int32 [V], in the form of `TokenCounts.seen`."""
    counts = np.zeros(vocabulary, dtype=np.int32)
    np.add.at(counts, np.array(token_ids, dtype=np.int64), 2)
    counts[np.array(prompt_ids, dtype=np.int64)] |= 1
    return counts


def allowed_only(logits: mx.array, mask: RowSubset) -> mx.array:
    """The rows of logits [R, V] that have a mask, uint32 [F, ⌈V/32⌉] → [F, V] with −inf where it has no bit: token t is
    bit t mod 32 of word t // 32."""
    bits = (mask.values[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    allowed = bits.reshape(len(mask.values), -1)[:, : logits.shape[-1]] > 0
    return mx.where(allowed, mask.of(logits), -math.inf)


def without(logits: mx.array, banned: Pairs) -> mx.array:
    """Logits with −inf at (row, token) pairs, an array of its own."""
    logits = logits + 0.0
    logits[banned[0], banned[1]] = -math.inf
    return logits
