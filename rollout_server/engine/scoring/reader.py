"""Teacher forcing, embeddings and label scores: what every reader promises, and what it does with logits and hidden
states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from rollout_server.engine.batch.row import TopTokens
from rollout_server.engine.sampling.filter_kernel import FilterKernel
from rollout_server.engine.sampling.numerics import block_sums, exponential
from rollout_server.engine.sampling.sampler import entropy_of, top_of
from rollout_server.engine.scoring.job import Pool, ScoredSequenceState, ScoreJob, SharedPrefix
from rollout_server.engine.scoring.labels import LabelPart, score_states, score_tokens
from rollout_server.engine.scoring.replay import TokenRange, replay_tokens
from rollout_server.engine.sight.seen import View
from rollout_server.errors import NonFiniteLogits

LOGIT_BYTES, LEAST_BYTES = 64 * 2**20, 8 * 2**20
"""float32 logits alive at once: an eighth of the KV memory within these bounds."""
SLICES = 4
"""Values of those logits are read in so many parts, since each part is copied a few times."""


def logit_tokens(vocabulary: int, kv_memory: int) -> int:
    """How many tokens may have their logits alive at once."""
    return max(1, min(LOGIT_BYTES, max(LEAST_BYTES, kv_memory // 8)) // (4 * vocabulary))


class Reader(Protocol):
    """Feeds sequences through the model. `cells` are the KV columns it may come to fill, 0 when it holds nothing."""

    limit: int
    """Sequences it takes at once."""

    @property
    def size(self) -> int:
        """Sequences it holds."""

    @property
    def left(self) -> int:
        """Inputs it still has to read."""

    @property
    def cells(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """KV memory it takes now, bytes."""

    def cells_with(self, count: int, columns: int) -> int:
        """`cells` once `count` more sequences of at most `columns` inputs joined."""

    def begin(self, prefix: SharedPrefix, count: int) -> None:
        """Takes the next `count` waiting sequences of one shared prefix that is not joining."""

    def awaits(self, prefix: SharedPrefix) -> bool:
        """True while a prompt is read whose KV one that has not begun can have afterwards."""

    def views(self, budget: int) -> list[View]:
        """Those of what `read` feeds next that may show pictures."""

    def read(self, budget: int) -> list[ScoredSequenceState]:
        """Feeds about `budget` inputs; returns the sequences that ended, some of them with a `fault`."""

    def drop(self, job: ScoreJob) -> None:
        """Forgets the sequences of a job."""

    def reset(self) -> None:
        """Forgets everything, after a failure."""


def measure(
    logits: mx.array,
    parts: Sequence[tuple[ScoredSequenceState, int]],
    state: Sequence[Any],
    most: int,
    kernel: FilterKernel | None,
) -> None:
    """Reads the values of each part's next n inputs from logits [B, N, V] (row i is part i, its first n columns) and
    evaluates `state` with them. A sequence whose values are not numbers gets a fault. Does not count them as fed.
    Copies are made of at most about `most` ÷ `SLICES` tokens' logits at a time. `kernel` filters what is drawn
    again, as it did when it was drawn first."""
    mx.eval(logits, *state)
    labelled = [(row, sequence, n) for row, (sequence, n) in enumerate(parts) if sequence.labels is not None]
    if not labelled:
        return _measure(logits, parts, most, kernel)
    _blame(labelled, score_tokens(logits, _label_parts(labelled)), "scoring")
    plain = [row for row, (sequence, _) in enumerate(parts) if sequence.labels is None]
    if plain:
        _measure(logits[mx.array(plain)], [parts[row] for row in plain], most, kernel)


def _measure(
    logits: mx.array, parts: Sequence[tuple[ScoredSequenceState, int]], most: int, kernel: FilterKernel | None
) -> None:
    width, vocabulary = logits.shape[1:]
    flat = logits.reshape(-1, vocabulary)
    targets = np.zeros((len(parts), width), dtype=np.int32)
    for wanted_ids, (sequence, n) in zip(targets, parts, strict=True):
        wanted_ids[:n] = sequence.tokens[sequence.next_input + 1 : sequence.next_input + 1 + n]
    temperatures = np.repeat([sequence.job.temperature for sequence, _ in parts], width).astype(np.float32)
    step = max(1, -(-most // SLICES))
    slices = [_Slice(flat, start, min(start + step, len(flat)), temperatures) for start in range(0, len(flat), step)]
    jobs = [sequence.job for sequence, _ in parts]
    k = min(max(job.top_logprobs for job in jobs), vocabulary)
    entropy = any(job.entropy for job in jobs)
    read = [each.values(targets.reshape(-1), entropy, k) for each in slices]
    shape = (len(parts), width)
    values, spread, top_ids, tops = (
        np.concatenate(column).reshape(*shape, *column[0].shape[1:]).tolist() for column in zip(*read, strict=True)
    )
    for row, (sequence, n) in enumerate(parts):
        if any(math.isnan(value) for value in values[row][:n]):
            version = sequence.run.version
            sequence.fault = NonFiniteLogits(f"The model produced NaN or infinity while scoring under {version}.")
            continue
        wanted = sequence.job.top_logprobs
        for at in range(n):
            top: TopTokens | None = None
            if wanted:
                top = tuple(zip(top_ids[row][at][:wanted], tops[row][at][:wanted], strict=True))
            sequence.keep(values[row][at], spread[row][at] if sequence.job.entropy else None, top)
    _replay(slices, parts, width, kernel)


def _replay(
    slices: Sequence[_Slice],
    parts: Sequence[tuple[ScoredSequenceState, int]],
    width: int,
    kernel: FilterKernel | None,
) -> None:
    """Draws the tokens of the parts that are replayed once more, from slices of logits [B · `width`, V]."""
    token_ranges = [
        TokenRange(sequence.replay, row * width, sequence.next_input + 1 - len(sequence.replay.prompt_ids), n)
        for row, (sequence, n) in enumerate(parts)
        if sequence.replay is not None and sequence.fault is None
    ]
    for each in slices if token_ranges else ():
        within = [part for token_range in token_ranges if (part := token_range.within(each.start, each.end))]
        replay_tokens(each.raw, within, kernel)


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """Rows `start` to `end` of logits [N, V]."""

    logits: mx.array
    start: int
    end: int
    temperatures: np.ndarray

    @property
    def raw(self) -> mx.array:
        """float32, tempered."""
        raw = self.logits[self.start : self.end].astype(mx.float32)
        own = self.temperatures[self.start : self.end]
        return raw if (own == 1.0).all() else raw / mx.array(own)[:, None]

    def values(self, targets: np.ndarray, entropy: bool, k: int) -> tuple[np.ndarray, ...]:
        """For each row the target's log-probability, the entropy, and ids and log-probabilities of the k best; empty
        where they are not wanted."""
        raw = self.raw
        shifted = raw - mx.max(raw, axis=-1, keepdims=True)
        exponentials = exponential(shifted)
        log_total = mx.log(mx.sum(block_sums(exponentials), axis=-1, keepdims=True))
        chosen = mx.array(targets[self.start : self.end, None])
        found = [(mx.take_along_axis(shifted, chosen, axis=-1) - log_total)[:, 0]]
        nothing = mx.zeros((len(raw), 0))
        found.append(entropy_of(shifted, exponentials, log_total) if entropy else nothing)
        found += top_of(shifted, log_total, k) if k else (nothing, nothing)
        mx.eval(found)
        return tuple(np.array(each) for each in found)


def gather(hidden: mx.array, parts: Sequence[tuple[ScoredSequenceState, int]], state: Sequence[Any]) -> None:
    """`measure` for sequences that are embedded or classified: hidden [B, N, width] instead of logits."""
    pooled = [(row, sequence, n) for row, (sequence, n) in enumerate(parts) if sequence.pool is not None]
    labelled = [(row, sequence, n) for row, (sequence, n) in enumerate(parts) if sequence.labels is not None]
    if pooled:
        own = hidden if len(pooled) == len(parts) else hidden[mx.array([row for row, _, _ in pooled])]
        pools = [(sequence.pool, n) for _, sequence, n in pooled if sequence.pool is not None]
        _blame(pooled, pool(own, pools, [] if labelled else state), "embedding")
    if labelled:
        _blame(labelled, score_states(hidden, _label_parts(labelled), state), "classifying")


def _label_parts(members: Sequence[tuple[int, ScoredSequenceState, int]]) -> list[LabelPart]:
    return [
        LabelPart(sequence.labels, row, sequence.next_input, n)
        for row, sequence, n in members
        if sequence.labels is not None
    ]


def _blame(members: Sequence[tuple[int, ScoredSequenceState, int]], finite: Sequence[bool], doing: str) -> None:
    for (_, sequence, _), fine in zip(members, finite, strict=True):
        if not fine:
            version = sequence.run.version
            sequence.fault = NonFiniteLogits(f"The model produced NaN or infinity while {doing} under {version}.")


def pool(hidden: mx.array, parts: Sequence[tuple[Pool, int]], state: Sequence[Any]) -> list[bool]:
    """Adds the states of each part's next n inputs from hidden [B, N, width] (row i is part i, its first n columns) and
    evaluates `state` with them. Says which parts are finite; the others are left as they were."""
    counts = mx.array([count for _, count in parts], dtype=mx.int32)
    own = mx.arange(hidden.shape[1])[None] < counts[:, None]
    # Padding may be anything, NaN too.
    sums = mx.where(own[..., None], hidden.astype(mx.float32), 0.0).sum(axis=1)
    mx.eval(sums, *state)
    finite = []
    for (each, _), found in zip(parts, np.array(sums).astype(np.float64), strict=True):
        finite.append(bool(np.isfinite(found).all()))
        if finite[-1]:
            each.total = found if each.total is None else each.total + found
    return finite
