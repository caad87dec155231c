"""Sums of versions: every token counts for the version that sampled it, every row for the one that ended it."""

from __future__ import annotations

import math

from rollout_server.http.observing.version_totals import VersionTable
from rollout_server.rollout import (
    FinishReason,
    GivenSpan,
    PolicyVersion,
    Prefix,
    Rollout,
    SamplingParams,
    Span,
    Timings,
)


def version(number: int, digest: str = "c") -> PolicyVersion:
    return PolicyVersion("policy", number, "sha256:" + digest * 64)


def rollout(*spans: tuple[int, int, int], given: int = 0, entropy: bool = True) -> Rollout:
    """`spans` are (version, start, end)."""
    length = spans[-1][2]
    values = tuple(-1.0 - at for at in range(length))
    unknown = (math.nan,) * given
    prefix = Prefix(
        (1,) * given, values[:given], values[:given], (0,) * given, (GivenSpan(None, None, None, None, 0, given),)
    )
    return Rollout(
        0, 0, (7,), (1,) * length, values, values, (0.0,) * length,
        tuple(Span(version(number), start, end) for number, start, end in spans),
        FinishReason.STOP, 1, 1, SamplingParams(length + 1), Timings(0.0, 0.0, 0.0),
        entropy=unknown + (0.5,) * (length - given) if entropy else None,
        base_logprobs=unknown + tuple(value - 0.25 for value in values[given:]),
        prefix=prefix if given else Prefix((), (), (), (), ()),
    )  # fmt: skip


def test_a_row_of_two_versions_is_divided_by_its_spans() -> None:
    table = VersionTable()
    table.add(rollout((1, 0, 2), (2, 2, 5)), live=4)
    first, second = table.of("policy", 1), table.of("policy", 2)
    assert first is not None and second is not None
    assert (first.tokens, first.rows, first.logprobs.value) == (2, 0, -1.5)
    assert (second.tokens, second.rows, second.row_tokens, second.logprobs.value) == (3, 1, 5, -4.0)
    assert second.staleness == 2 and dict(second.finish_reasons) == {"stop": 1}
    assert first.log_ratio.value == second.log_ratio.value == 0.25
    assert second.entropy.value == 0.5


def test_a_prefix_is_nobody_s_work_and_unknown_numbers_are_left_out() -> None:
    table = VersionTable()
    table.add(rollout((1, 2, 4), given=2), live=1)
    totals = table.of("policy", 1)
    assert totals is not None
    assert (totals.tokens, totals.row_tokens, totals.logprobs.value, totals.entropy.count) == (2, 2, -3.5, 2)
    table.add(rollout((1, 0, 2), entropy=False), live=1)
    assert totals.entropy.count == 2 and totals.tokens == 4


def test_a_value_that_is_no_number_spoils_no_mean() -> None:
    table = VersionTable()
    row = rollout((1, 0, 3))
    table.add(Rollout(**{**vars_of(row), "entropy": (1.0, math.nan, 3.0)}), live=1)
    totals = table.of("policy", 1)
    assert totals is not None and totals.entropy.value == 2.0


def vars_of(row: Rollout) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def test_the_version_that_was_used_longest_ago_makes_room() -> None:
    table = VersionTable(most=2)
    for number in (1, 2, 1, 3):
        table.add(rollout((number, 0, 1)), live=3)
    assert sorted(totals.version.number for totals in table) == [1, 3]
    kept = table.of("policy", 1)
    assert kept is not None and kept.rows == 2
