"""Times between the tokens of rows, against a list that keeps every one of them."""

from __future__ import annotations

import random
from bisect import bisect_left
from itertools import pairwise
from types import SimpleNamespace

from rollout_server.engine.messages.status import GAP_BOUNDS, TokenGaps
from rollout_server.engine.requests.token_gaps import TokenGapCounter


def test_every_gap_is_counted_whenever_a_row_joins_stalls_or_comes_back() -> None:
    chance, now = random.Random(3), 100.0
    counter = TokenGapCounter(lambda: now)
    rows = [SimpleNamespace(told_at=0.0) for _ in range(20)]
    times: dict[int, list[float]] = {at: [] for at in range(len(rows))}
    told: list[int] = []
    for _ in range(500):
        now += chance.choice([0.0004, 0.003, 0.05, 1.5, 7.0])
        if chance.random() < 0.4:  # else the rows are those of the step before
            told = chance.sample(range(len(rows)), chance.randrange(len(rows) + 1))
        if chance.random() < 0.2:
            counter.note()
        counter.told([rows[at] for at in told])  # type: ignore[misc]
        for at in told:
            times[at].append(now)
    gaps = [after - before for own in times.values() for before, after in pairwise(own)]
    counts = [0] * (len(GAP_BOUNDS) + 1)
    for gap in gaps:
        counts[bisect_left(GAP_BOUNDS, gap)] += 1
    assert counter.gaps.counts == tuple(counts) and sum(counts) > 1000
    # A sum of so many floats in another order: each addition errs by half a unit of the total.
    assert abs(counter.gaps.seconds - sum(gaps)) <= len(gaps) * 2**-52 * sum(gaps)


def test_the_gaps_of_two_engines_are_added() -> None:
    one, other = TokenGaps((1,) * 14, 2.0), TokenGaps((0,) * 13 + (5,), 40.0)
    assert one + other == TokenGaps((1,) * 13 + (6,), 42.0)
