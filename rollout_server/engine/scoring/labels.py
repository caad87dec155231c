"""Label scores of sequences at some of their positions: a head on hidden states, or log-probabilities of a few tokens,
which any decoder gives. Sequences that begin alike are found here, so that what they share is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from rollout_server.engine.model.tasks.heads import Head

WORTH = 64
"""Tokens from which on it pays to read a beginning apart from the rest."""


@dataclass(slots=True, eq=False)
class LabelReading:
    """What one sequence is read for. `positions` are ascending; `head` scores the hidden states there, or else the
    distribution behind them is asked for `token_ids`."""

    positions: tuple[int, ...]
    head: Head | None
    token_ids: tuple[int, ...] = ()
    rows: list[np.ndarray] = field(default_factory=list)
    """float32 [labels] of each position that has been read."""

    @property
    def labels(self) -> int:
        return len(self.token_ids) if self.head is None else self.head.labels

    def columns(self, begin: int, count: int) -> list[int]:
        """Which of the inputs `begin` to `begin + count` are wanted, counted from `begin`."""
        return [at - begin for at in self.positions if begin <= at < begin + count]

    @property
    def scores(self) -> bytes:
        """Little-endian float32 [positions, labels], once everything was read."""
        return np.stack(self.rows).astype("<f4").tobytes()


@dataclass(frozen=True, slots=True)
class LabelPart:
    """Inputs of one sequence in a forward: row `row` of its output, `count` columns from input `begin` on."""

    reading: LabelReading
    row: int
    begin: int
    count: int


def score_states(hidden: mx.array, parts: Sequence[LabelPart], state: Sequence[Any]) -> list[bool]:
    """Applies each part's head to hidden [B, N, width] where it is wanted, and evaluates `state` with that. Says which
    parts are finite; the others are left as they were."""
    columns = [part.reading.columns(part.begin, part.count) for part in parts]
    by_head: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        if columns[index]:
            by_head.setdefault(id(part.reading.head), []).append(index)
    found: list[tuple[list[int], mx.array]] = []
    for members in by_head.values():
        head = parts[members[0]].reading.head
        if head is None:
            raise RuntimeError("Hidden states are scored without a head.")
        rows = [parts[index].row for index in members for _ in columns[index]]
        wanted = [column for index in members for column in columns[index]]
        # Only what is wanted leaves the forward, so that padding, which may be anything, is never looked at.
        found.append((members, head(hidden[mx.array(rows), mx.array(wanted)].astype(mx.float32))))
    mx.eval([scores for _, scores in found], *state)
    finite = [True] * len(parts)
    for members, scores in found:
        _hand_out(np.array(scores), [(parts[index], columns[index], index) for index in members], finite)
    return finite


def score_tokens(logits: mx.array, parts: Sequence[LabelPart]) -> list[bool]:
    """The log-probabilities of each part's tokens in logits [B, N, V] where they are wanted, in float32."""
    finite = [True] * len(parts)
    found: list[tuple[int, list[int], mx.array]] = []
    for index, part in enumerate(parts):
        if columns := part.reading.columns(part.begin, part.count):
            raw = logits[part.row, mx.array(columns)].astype(mx.float32)
            chosen = raw[:, mx.array(part.reading.token_ids)] - mx.logsumexp(raw, axis=-1, keepdims=True)
            found.append((index, columns, chosen))
    mx.eval([chosen for _, _, chosen in found])
    for index, columns, chosen in found:
        _hand_out(np.array(chosen), [(parts[index], columns, index)], finite)
    return finite


def _hand_out(scores: np.ndarray, members: Sequence[tuple[LabelPart, list[int], int]], finite: list[bool]) -> None:
    """Rows of `scores`, in the order of `members`, to whom they belong."""
    at = 0
    for part, columns, index in members:
        own = scores[at : at + len(columns)]
        at += len(columns)
        # A token may have probability 0; a head's score is a number.
        finite[index] = bool((np.isfinite(own) if part.reading.head is not None else ~np.isnan(own)).all())
        if finite[index]:
            part.reading.rows += list(own)


def alike(sequences: Sequence[tuple[int, ...]], most: Sequence[int]) -> list[tuple[list[int], int]]:
    """Runs of neighbouring sequences that begin alike: their indices, and how many tokens they share. A sequence takes
    part with at most its `most` first tokens, and joins the run before it unless that would then save less."""
    runs: list[tuple[list[int], int]] = []
    for index, tokens in enumerate(sequences):
        if runs:
            members, shared = runs[-1]
            limit = most[members[0]] if len(members) == 1 else shared
            together = common(sequences[members[0]], tokens, min(limit, most[index]))
            if together >= WORTH and len(members) * together >= (len(members) - 1) * shared:
                runs[-1] = ([*members, index], together)
                continue
        runs.append(([index], 0))
    return runs


def common(first: tuple[int, ...], second: tuple[int, ...], most: int) -> int:
    """How many of their first tokens, `most` at most, are the same; below `WORTH` it may say 0."""
    if most < WORTH or first[:WORTH] != second[:WORTH]:
        return 0
    low, high = WORTH, most
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
