"""What every version has sampled: sums over the rows that have ended, for the versions that were used last."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rollout_server.rollout import PolicyVersion, Rollout, Span

MOST_VERSIONS = 64
"""Versions of which sums are kept. A metric's label may have so many values, and no more."""


@dataclass(slots=True)
class Mean:
    """A running mean of numbers that need not be known for every token."""

    total: float = 0.0
    count: int = 0

    def add(self, values: Sequence[float]) -> None:
        """Values that are no numbers are unknown, and left out."""
        total = math.fsum(values)
        if math.isfinite(total):
            self.total += total
            self.count += len(values)
            return
        known = [value for value in values if math.isfinite(value)]
        self.total += math.fsum(known)
        self.count += len(known)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class VersionTotals:
    """Sums of one version. A token counts for the version that sampled it; a row, with its length, its end and its
    staleness, for the version that sampled its last token."""

    version: PolicyVersion
    tokens: int = 0
    rows: int = 0
    row_tokens: int = 0
    """Tokens of those rows, whichever versions sampled them."""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    staleness: int = 0
    """Sum over rows: by how many versions the live one was ahead when the row ended."""
    logprobs: Mean = field(default_factory=Mean)
    entropy: Mean = field(default_factory=Mean)
    """Only of rows that asked for it."""
    log_ratio: Mean = field(default_factory=Mean)
    """log π − log base of sampled tokens, of rows that asked for `base_logprobs`: its mean estimates KL(π ‖ base)
    where rows are sampled at temperature 1 without filters (the estimator k1)."""


class VersionTable:
    """Totals by version; the version whose last row ended longest ago makes room for a new one."""

    def __init__(self, most: int = MOST_VERSIONS) -> None:
        self._most = most
        self._totals: OrderedDict[tuple[str, int], VersionTotals] = OrderedDict()

    def __iter__(self) -> Iterator[VersionTotals]:
        return iter(self._totals.values())

    def of(self, name: str, number: int) -> VersionTotals | None:
        return self._totals.get((name, number))

    def add(self, rollout: Rollout, live: int) -> None:
        """Counts a row that has ended; `live` is the number that its policy's name points to now, 0 for
        none."""
        for span in rollout.spans:
            _add_span(self._found(span.version), rollout, span)
        if not rollout.spans:
            return
        last = self._found(rollout.spans[-1].version)
        last.rows += 1
        last.row_tokens += rollout.sampled
        last.finish_reasons[str(rollout.finish_reason)] += 1
        last.staleness += max(0, live - last.version.number)

    def _found(self, version: PolicyVersion) -> VersionTotals:
        key = (version.name, version.number)
        totals = self._totals.get(key)
        if totals is None or totals.version.digest != version.digest:
            totals = self._totals[key] = VersionTotals(version)
        self._totals.move_to_end(key)
        while len(self._totals) > self._most:
            self._totals.popitem(last=False)
        return totals


def _add_span(totals: VersionTotals, rollout: Rollout, span: Span) -> None:
    tokens = slice(span.start, span.end)
    totals.tokens += span.end - span.start
    logprobs = rollout.logprobs[tokens]
    totals.logprobs.add(logprobs)
    if rollout.entropy is not None:
        totals.entropy.add(rollout.entropy[tokens])
    if rollout.base_logprobs is not None:
        pairs = zip(logprobs, rollout.base_logprobs[tokens], strict=True)
        totals.log_ratio.add([own - base for own, base in pairs])
