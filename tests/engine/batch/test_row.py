"""A row's own arithmetic, without a model: its spans, its columns, and what it tells of itself when it is over."""

from __future__ import annotations

import math
from typing import Any

import pytest

from adapters.placement import Placement
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.kv_cache.sizes import HEADROOM
from rollout_server.errors import EngineFault
from rollout_server.rollout import (
    CARRIED,
    RECOMPUTED,
    FinishReason,
    PolicyAddress,
    PolicyVersion,
    Prefix,
    RolloutRequest,
    RowError,
    SamplingParams,
    Span,
    Wants,
)

OLD, NEW = PolicyVersion("policy", 1, "sha256:1"), PolicyVersion("policy", 2, "sha256:2")
BASE = PolicyVersion("base", 0, "sha256:0")
PREFIX = Prefix((7, 8), (-0.5, -1.0), (-0.25, math.nan), (1, 0), ())
END = 99


def row_of(version: PolicyVersion = OLD, *, max_tokens: int = 8, params: Any = None, **fields: Any) -> Row:
    sampling = SamplingParams(max_tokens, **(params or {}))
    request = RolloutRequest("r", (1, 2, 3), sampling, PolicyAddress("policy"), seeds=(0,), **fields)
    group = Group(request, version=version)
    return Row(group, 0, 0, version, Placement(), None)


def sample(row: Row, *tokens: int) -> None:
    for token in tokens:
        row.stamp()
        row.record(token, (-1.0, -2.0, -3.0, 4.0), ((token, -1.0), (0, -5.0)), frozenset({END}))


def test_a_token_belongs_to_the_version_under_which_its_step_was_dispatched() -> None:
    row = row_of()
    sample(row, 5)
    row.stamp()  # in flight under the old version when the alias moves
    row.version, row.switched = NEW, True
    row.record(6, (0.0, 0.0, 0.0), None, frozenset())
    assert row.spans == [Span(OLD, 0, 2)]
    sample(row, 7)
    assert row.spans == [Span(OLD, 0, 2), Span(NEW, 2, 3, CARRIED)]
    assert row.holds_prompt, "its prompt's KV is its group's, whatever came behind it"


def test_a_row_that_is_read_again_begins_a_span_though_its_version_is_the_same() -> None:
    row = row_of()
    sample(row, 5, 6)
    held = [row.holds_prompt]
    row.recomputed = True
    held.append(row.holds_prompt)
    sample(row, 7, 4)
    held.append(row.holds_prompt)
    assert row.spans == [Span(OLD, 0, 2), Span(OLD, 2, 4, RECOMPUTED)]
    assert held == [True, False, False], "its prompt's KV is not what its group's prefill left"


def test_a_row_that_moved_on_before_its_first_token_does_not_hold_its_group_s_prompt() -> None:
    row = row_of()
    held = [row.holds_prompt]
    row.version, row.switched = NEW, True
    held.append(row.holds_prompt)
    sample(row, 5)
    assert [*held, row.holds_prompt] == [True, False, False]
    assert row.spans == [Span(NEW, 0, 1, CARRIED)]


def test_a_step_in_flight_is_no_part_of_the_rollout() -> None:
    row = row_of()
    sample(row, 5)
    row.version = NEW
    row.stamp()
    assert row.spans == [Span(OLD, 0, 1), Span(NEW, 1, 2)]
    row.end(FinishReason.ABORTED, "client")
    assert row.rollout().spans == (Span(OLD, 0, 1),)


def test_a_prefix_counts_for_the_length_and_has_no_values_but_its_own() -> None:
    row = row_of(prefix=PREFIX, max_tokens=4, wants=Wants(entropy=True, top_logprobs=1))
    assert (row.dispatched, row.sampled, row.offset, row.input_id) == (2, 0, 4, 8)
    wanted = []
    for token in (5, 6):
        wanted.append(row.wants_step)
        sample(row, token)
    assert [*wanted, row.wants_step] == [True, True, False] and row.finish_reason is FinishReason.LENGTH
    rollout = row.rollout()
    assert rollout.token_ids == (7, 8, 5, 6) and rollout.sampled == 2
    assert rollout.logprobs == (-0.5, -1.0, -1.0, -1.0)
    assert rollout.entropy is not None and list(map(math.isnan, rollout.entropy)) == [True, True, False, False]
    assert rollout.top_logprobs == (None, None, ((5, -1.0),), ((6, -1.0),))
    assert rollout.spans == (Span(OLD, 2, 4, RECOMPUTED),), "whatever sampled the prefix, it was read here"


@pytest.mark.parametrize(
    ("token", "params", "reason", "stop"),
    [
        (END, {}, FinishReason.STOP, END),
        (END, {"ignore_eos": True}, FinishReason.LENGTH, None),
        (END, {"ignore_eos": True, "stop_token_ids": (END,)}, FinishReason.STOP, END),
        (5, {"stop_token_ids": (5,)}, FinishReason.STOP, 5),
        (5, {}, FinishReason.LENGTH, None),
    ],
)
def test_a_stop_at_the_last_token_beats_the_length(
    token: int, params: dict[str, Any], reason: FinishReason, stop: int | None
) -> None:
    row = row_of(max_tokens=1, params=params)
    sample(row, token)
    assert (row.finish_reason, row.stop_reason) == (reason, stop)


def test_columns_are_those_of_what_was_dispatched_and_never_more_than_it_may_have() -> None:
    row, short = row_of(max_tokens=10 * HEADROOM), row_of(max_tokens=2)
    assert (row.offset, row.columns_soon) == (2, 3 + HEADROOM)
    sample(row, 5, 5)
    assert (row.offset, row.columns_soon) == (4, 5 + HEADROOM)
    assert short.columns_soon == 3 + 2 == short.group.length == short.group.columns_soon


def test_only_a_version_s_tokens_need_another_pass_under_the_base() -> None:
    asked = Wants(base_logprobs=True)
    row, own, empty = row_of(wants=asked), row_of(BASE, wants=asked), row_of(wants=asked)
    sample(row, 5)
    sample(own, 5)
    assert row.waits and row.rollout().base_logprobs is None
    assert not own.waits and own.rollout().base_logprobs == (-1.0,)
    assert not empty.waits and empty.rollout().base_logprobs == ()


def test_a_row_that_failed_keeps_what_it_has_and_does_not_wait_for_its_prompt_s_values() -> None:
    row = row_of()
    row.group.unscored = True
    sample(row, 5)
    waited = row.waits
    row.fail(EngineFault("It broke."))
    assert waited and not row.waits and not row.running and not row.holds_prompt
    rollout = row.rollout()
    assert rollout.finish_reason is FinishReason.ERROR and rollout.token_ids == (5,)
    assert rollout.error == RowError("engine_fault", "It broke.")


def test_a_group_that_is_drawn_again_begins_on_its_number_and_follows_its_name() -> None:
    group = row_of().group
    assert group.address == PolicyAddress("policy")
    group.begins_on = 3
    assert group.address == PolicyAddress("policy", 3) and group.request.policy.follows
