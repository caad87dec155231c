"""Teacher-forced log-probabilities: what every reader does with logits, and the slow, obvious reader, which takes one
sequence at a time on mlx-lm's own caches. The batched one (`score_rows`) is checked against it.

Sequences go through in chunks, so that memory does not grow with length × vocabulary; inputs whose values nobody wants
go through the model without its head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from rollout_server.engine.cache import Forward
from rollout_server.engine.exponentials import block_sums, exponential
from rollout_server.engine.passages import Family, Passage, ScoreJob
from rollout_server.engine.pooling import pool
from rollout_server.engine.redraw import Stretch, redraw
from rollout_server.engine.sampling import entropy_of, top_of
from rollout_server.engine.sequence import TopTokens
from rollout_server.errors import NonFiniteLogits

LOGIT_BYTES, LEAST_BYTES = 64 * 2**20, 8 * 2**20
"""float32 logits alive at once: an eighth of the KV memory within these bounds,"""
SLICES = 4
"""and their values are read in so many parts, each of which is copied a few times."""


def logit_tokens(vocabulary: int, kv_memory: int) -> int:
    """How many tokens may have their logits alive at once."""
    return max(1, min(LOGIT_BYTES, max(LEAST_BYTES, kv_memory // 8)) // (4 * vocabulary))


class Reader(Protocol):
    """Feeds passages through the model. `cells` are the KV columns it may come to fill, 0 when it holds nothing."""

    limit: int
    """Passages it takes at once."""

    @property
    def size(self) -> int:
        """Passages it holds."""

    @property
    def left(self) -> int:
        """Inputs it still has to read."""

    @property
    def cells(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """KV memory it takes now, bytes."""

    def cells_with(self, count: int, columns: int) -> int:
        """`cells` once `count` more passages of at most `columns` inputs joined."""

    def begin(self, family: Family, count: int) -> None:
        """Takes the next `count` waiting passages of a family that is not joining."""

    def read(self, budget: int) -> list[Passage]:
        """Feeds about `budget` inputs; returns the passages that ended, some of them with a `fault`."""

    def drop(self, job: ScoreJob) -> None:
        """Forgets the passages of a job."""

    def reset(self) -> None:
        """Forgets everything, after a failure."""


def measure(logits: mx.array, parts: Sequence[tuple[Passage, int]], state: Sequence[Any], most: int) -> None:
    """Reads the values of each part's next n inputs from logits [B, N, V] (row i is part i, its first n columns) and
    evaluates `state` with them. A passage whose values are not numbers gets a fault. Does not count them as fed.
    Copies are made of at most about `most` ÷ `SLICES` tokens' logits at a time."""
    width, vocabulary = logits.shape[1:]
    flat = logits.reshape(-1, vocabulary)
    mx.eval(flat, *state)
    targets = np.zeros((len(parts), width), dtype=np.int32)
    for wanted_ids, (passage, n) in zip(targets, parts, strict=True):
        wanted_ids[:n] = passage.tokens[passage.fed + 1 : passage.fed + 1 + n]
    temperatures = np.repeat([passage.job.temperature for passage, _ in parts], width).astype(np.float32)
    step = max(1, -(-most // SLICES))
    slices = [_Slice(flat, start, min(start + step, len(flat)), temperatures) for start in range(0, len(flat), step)]
    jobs = [passage.job for passage, _ in parts]
    k = min(max(job.top_logprobs for job in jobs), vocabulary)
    entropy = any(job.entropy for job in jobs)
    read = [each.values(targets.reshape(-1), entropy, k) for each in slices]
    shape = (len(parts), width)
    values, spread, top_ids, tops = (
        np.concatenate(column).reshape(*shape, *column[0].shape[1:]).tolist() for column in zip(*read, strict=True)
    )
    for row, (passage, n) in enumerate(parts):
        if any(math.isnan(value) for value in values[row][:n]):
            version = passage.leg.version
            passage.fault = NonFiniteLogits(
                f"The model produced NaN or infinity while scoring under {version.name}@{version.number}."
            )
            continue
        wanted = passage.job.top_logprobs
        for at in range(n):
            top: TopTokens | None = None
            if wanted:
                top = tuple(zip(top_ids[row][at][:wanted], tops[row][at][:wanted], strict=True))
            passage.keep(values[row][at], spread[row][at] if passage.job.entropy else None, top)
    stretches = [
        Stretch(passage.redraw, row * width, passage.fed + 1 - len(passage.redraw.prompt_ids), n)
        for row, (passage, n) in enumerate(parts)
        if passage.redraw is not None and passage.fault is None
    ]
    for each in slices if stretches else ():
        redraw(each.raw, [part for stretch in stretches if (part := stretch.within(each.start, each.end))])


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
        """Of each row the target's log-probability, the entropy, and ids and log-probabilities of the k best; empty
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


def gather(hidden: mx.array, parts: Sequence[tuple[Passage, int]], state: Sequence[Any]) -> None:
    """`measure` for passages that are embedded: hidden [B, N, width] instead of logits."""
    pools = [(passage.pool, n) for passage, n in parts if passage.pool is not None]
    for (passage, _), finite in zip(parts, pool(hidden, pools, state), strict=True):
        if not finite:
            version = passage.leg.version
            passage.fault = NonFiniteLogits(
                f"The model produced NaN or infinity while embedding under {version.name}@{version.number}."
            )


class SequentialReader:
    """The methods of `Reader`, one passage at a time. `chunk` tokens may have their logits alive at once;
    `row_cells(columns)` is what a sequence costs in KV columns."""

    limit = 1

    def __init__(
        self,
        forward: Forward,
        make_caches: Callable[[], list[Any]],
        route: Callable[[Sequence[Any]], None],
        chunk: int,
        row_cells: Callable[[int], int],
        hidden: Forward | None = None,
    ) -> None:
        self._forward = forward
        self._hidden = hidden or forward
        self._make_caches = make_caches
        self._route = route
        self._chunk = chunk
        self._row_cells = row_cells
        self._family: Family | None = None
        self._passage: Passage | None = None
        self._caches: list[Any] | None = None
        """Of the passage; None while its family's prompt is being read."""

    @property
    def size(self) -> int:
        return 0 if self._passage is None else 1

    @property
    def left(self) -> int:
        return 0 if self._passage is None else self._passage.left

    @property
    def cells(self) -> int:
        return 0 if self._passage is None else self._row_cells(self._passage.length)

    @property
    def nbytes(self) -> int:
        kept = self._family.prompt.kept if self._family is not None else None
        caches = {id(cache): cache for cache in [*(self._caches or ()), *(kept or ())]}
        return sum(cache.nbytes for cache in caches.values())

    def cells_with(self, count: int, columns: int) -> int:
        return self.cells + count * self._row_cells(columns)

    def begin(self, family: Family, count: int) -> None:
        if self._passage is not None or count != 1:
            raise RuntimeError("This reader takes one passage at a time.")
        self._family, self._passage, self._caches = family, family.waiting.popleft(), None
        if family.prompt.kept is None:
            family.prompt.kept, family.prompt.fed = self._make_caches(), 0

    def read(self, budget: int) -> list[Passage]:
        passage, used = self._passage, 0
        if passage is None:
            return []
        while used < budget and not passage.ended:
            used += self._read_on(passage, budget - used)
        if not passage.ended:
            return []
        self.reset()
        return [passage]

    def _read_on(self, passage: Passage, budget: int) -> int:
        if self._caches is None and (fed := self._read_prompt(budget)):
            return fed
        caches = self._caches
        if passage.fed == 0 or caches is None:
            # A leg that reads everything again.
            caches = self._make_caches()
            self._caches = caches
        n = min(budget, passage.left_alike)
        if passage.scoring and passage.pool is None:
            n = min(n, self._chunk)
        self._route([passage.leg.slot])
        tokens = mx.array([passage.tokens[passage.fed : passage.fed + n]], dtype=mx.int32)
        out = (self._forward if passage.pool is None else self._hidden)(tokens, caches)
        state = [cache.state for cache in caches]
        if passage.scoring:
            if passage.pool is None:
                measure(out, [(passage, n)], state, self._chunk)
            else:
                gather(out, [(passage, n)], state)
        else:
            mx.eval(state)
        if passage.fault is None:
            passage.feed(n)
        return n

    def _read_prompt(self, budget: int) -> int:
        """Feeds what the family shares; once that is read, gives the passage caches that hold it and returns 0."""
        family, passage = self._family, self._passage
        kept = family.prompt.kept if family is not None else None
        if family is None or passage is None or kept is None:
            raise RuntimeError("A passage is read before it has begun.")
        prompt = family.prompt
        if not prompt.done:
            n = min(budget, len(prompt.tokens) - prompt.fed)
            self._route([prompt.slot])
            self._forward(mx.array([prompt.tokens[prompt.fed : prompt.fed + n]], dtype=mx.int32), kept)
            mx.eval([cache.state for cache in kept])
            prompt.fed += n
            return n
        self._caches = copy.deepcopy(kept) if family.waiting else kept
        if prompt.tokens:
            passage.feed(len(prompt.tokens))
        return 0

    def drop(self, job: ScoreJob) -> None:
        if self._passage is not None and self._passage.job is job:
            self.reset()

    def reset(self) -> None:
        self._family = self._passage = self._caches = None
