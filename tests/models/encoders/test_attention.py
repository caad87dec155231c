"""Attention some queries after others is attention, in less memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.models.encoders.attention import attend, attend_in_parts
from tests.support.numbers.bounds import assert_near, relative

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 512, 8


def made() -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(3)
    q, k, v = (mx.random.normal((BATCH, HEADS, TOKENS, WIDTH)) for _ in range(3))
    mx.eval(q, k, v)
    return q, k, v


@pytest.mark.parametrize("most", [1, BATCH * HEADS * TOKENS * 7, BATCH * HEADS * TOKENS * TOKENS, 2**40])
def test_queries_some_after_others_give_what_all_at_once_give(most: int) -> None:
    q, k, v = made()
    found, wanted = (np.array(each) for each in (attend_in_parts(q, k, v, most), attend(q, k, v, None)))
    # A score sums WIDTH products and moves a weight by as much; a value sums TOKENS of them.
    within = relative(WIDTH + TOKENS) * float(np.abs(wanted).max())
    assert_near(found, wanted, within)


def test_scores_alive_at_once_are_bounded() -> None:
    q, k, v = made()
    own = 4 * BATCH * HEADS * TOKENS * WIDTH
    scores = 4 * BATCH * HEADS * TOKENS * TOKENS

    def peak(most: int) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(attend_in_parts(q, k, v, most))
        return mx.get_peak_memory() - before

    # A sixteenth of the queries at a time; beside the scores stand arrays as large as what goes in.
    parts = 16
    assert peak(BATCH * HEADS * TOKENS * TOKENS // parts) < 3 * scores // parts + 8 * own < scores
