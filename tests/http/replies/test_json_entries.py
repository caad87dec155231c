"""What single results become as JSON: what was not asked for, what is no number, and where a text ends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rollout_server.engine.messages.status import ReplicaStatus
from rollout_server.engine.messages.versions import PolicyStatus, VersionStatus
from rollout_server.grammar import Grammar, GrammarKind
from rollout_server.http.replies.json_entries import (
    is_complete,
    json_response,
    policy_entry,
    policy_headers,
    reward_entry,
    rollout_entry,
    rollout_text,
    span_entry,
    structure_entry,
    text_ids,
    usage,
)
from rollout_server.rollout import (
    CARRIED,
    FinishReason,
    GivenSpan,
    PolicyAddress,
    PolicyVersion,
    Prefix,
    Rollout,
    RolloutRequest,
    RowError,
    RowReward,
    SamplingParams,
    Span,
    Timings,
)
from tests.support.tiny_tokenizers import byte_level

VERSION = PolicyVersion("policy", 7, "sha256:7", "step 7")
END = 1


def rollout_of(*tokens: int, prompt: int = 0, stop: str | int | None = None, **fields: Any) -> Rollout:
    count = len(tokens)
    usual: dict[str, Any] = {
        "prompt_index": prompt,
        "sample_index": 0,
        "prompt_ids": (3, 4),
        "token_ids": tokens,
        "logprobs": (-1.0,) * count,
        "sampling_logprobs": (-2.0,) * count,
        "log_kept_mass": (math.nan,) * count,
        "spans": (Span(VERSION, 0, count),),
        "finish_reason": FinishReason.LENGTH if stop is None else FinishReason.STOP,
        "stop_reason": stop,
        "seed": 5,
        "sampling": SamplingParams(16),
        "timings": Timings(1.23456, 0.0, 2.0),
    }
    return Rollout(**(usual | fields))


def entry_of(rollout: Rollout, *returns: str) -> dict[str, Any]:
    """As it is read on the other side."""
    entry = rollout_entry(rollout, request_id="r", prompt_id=None, returns=frozenset(returns), text=None)
    found: dict[str, Any] = json.loads(json_response(entry).content)
    return found


# ---- a row --------------------------------------------------------------------------------------------------------


def test_arrays_that_were_not_asked_for_are_null_though_they_are_there() -> None:
    row = rollout_of(5, 6, entropy=(0.5, 0.5), base_logprobs=(-3.0, -3.0), prompt_logprobs=(None, -1.0))
    optional = ("sampling_logprobs", "entropy", "base_logprobs", "prompt_logprobs")
    assert all(entry_of(row)[name] is None for name in (*optional, "log_kept_mass"))
    for name in optional:
        entry = entry_of(row, name)
        assert [other for other in optional if entry[other] is not None] == [name]
    assert entry_of(row)["logprobs"] == [-1.0, -1.0]


def test_what_is_no_number_is_null_in_json() -> None:
    assert entry_of(rollout_of(5, 6), "sampling_logprobs")["log_kept_mass"] == [None, None]
    assert json_response([math.nan, math.inf, -math.inf, 1.0]).content == b"[null,null,null,1.0]"


def test_a_row_with_a_prefix_says_what_is_given_and_what_is_its_own() -> None:
    given = GivenSpan("policy", 3, None, None, 0, 2)
    prefix = Prefix((8, 9), (-1.0, -1.0), (-1.0, -1.0), (1, 0), (given,))
    row = rollout_of(8, 9, 5, prefix=prefix, spans=(Span(VERSION, 2, 3, "recomputed"),))
    entry = entry_of(row)
    assert entry["loss_mask"] == [1, 0, 1]
    assert [(span["version"], span["start"], span["end"], span["kv"]) for span in entry["versions"]] == [
        (3, 0, 2, "recomputed"),
        (7, 2, 3, "recomputed"),
    ]


def test_a_span_says_only_of_kv_that_outlived_a_change() -> None:
    assert "kv" not in span_entry(Span(VERSION, 0, 2))
    assert span_entry(Span(VERSION, 0, 2, CARRIED))["kv"] == "carried"


def test_a_reward_is_its_scores_or_why_there_are_none() -> None:
    judge = PolicyVersion("base", 0, "sha256:0", resident="judge")
    assert reward_entry(None) is None
    assert reward_entry(RowReward((0.5, 1.0), judge)) == {
        "value": None,
        "scores": (0.5, 1.0),
        "model": {"name": "judge", "version": 0, "digest": "sha256:0"},
    }
    failed = RowReward(error=RowError("engine_fault", "It broke."))
    assert reward_entry(failed) == {"error": {"code": "engine_fault", "message": "It broke."}}


class Written:
    """A constraint of which only the grammar is asked for."""

    def __init__(self, kind: GrammarKind, text: str, whitespace: str | None = None) -> None:
        self.grammar = Grammar(kind, text, whitespace)


@pytest.mark.parametrize(
    ("written", "entry"),
    [
        (Written(GrammarKind.JSON, '{"type": "object"}'), {"json": {"type": "object"}}),
        (Written(GrammarKind.JSON, "true", ""), {"json": True, "disable_any_whitespace": True}),
        (Written(GrammarKind.JSON, "true", " ?"), {"json": True, "whitespace_pattern": " ?"}),
        (Written(GrammarKind.CHOICE, '["a", "b"]'), {"choice": ["a", "b"]}),
        (Written(GrammarKind.REGEX, "[0-9]"), {"regex": "[0-9]"}),
    ],
)
def test_a_grammar_is_told_as_it_could_be_asked_for(written: Any, entry: dict[str, Any]) -> None:
    assert structure_entry(written) == entry


# ---- its text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "plain", "with_stop"),
    [
        (rollout_of(5, END, stop=END), (5,), (5,)),
        (rollout_of(5, 6, stop=6, sampling=SamplingParams(16, stop_token_ids=(6,))), (5,), (5, 6)),
        (rollout_of(5, 6, stop="x"), (5, 6), (5, 6)),
        (rollout_of(5, 6), (5, 6), (5, 6)),
        (rollout_of(5, 6, finish_reason=FinishReason.ABORTED, stop="timeout"), (5, 6), (5, 6)),
    ],
    ids=["end token", "stop token", "stop string", "length", "aborted"],
)
def test_the_token_that_stopped_a_row_is_no_text(
    row: Rollout, plain: tuple[int, ...], with_stop: tuple[int, ...]
) -> None:
    assert tuple(text_ids(row)) == plain
    assert tuple(text_ids(row, include_stop=True)) == with_stop


@pytest.mark.parametrize(
    ("written", "stop", "text"),
    [
        (["a", "b", "c"], "c", "ab"),
        (["a", "b", "c"], "bc", "a"),
        # The first one came before min_tokens, and stopped nothing.
        (["c", "a", "c"], "c", "ca"),
        # One token decides of two of them: the earlier one stopped the row.
        (["a", "the"], "h", "at"),
        (["a", "the"], "ath", ""),
    ],
)
def test_a_text_ends_before_the_stop_string_that_its_last_token_completed(
    written: list[str], stop: str, text: str
) -> None:
    tokenizer = byte_level()
    ids = [token for piece in written for token in tokenizer.encode(piece, add_special_tokens=False)]
    assert len(ids) == len(written)
    sampling = SamplingParams(16, stop=(stop,))
    row = rollout_of(*ids, stop=stop, sampling=sampling)
    request = RolloutRequest("r", (3, 4), sampling, PolicyAddress("policy"), seeds=(0,))
    assert rollout_text(row, tokenizer, request) == text
    assert rollout_text(row, tokenizer, request, include_stop=True) == text + stop


# ---- of several rows ----------------------------------------------------------------------------------------------


def test_a_prompt_is_counted_once_with_the_most_that_was_cached_of_it() -> None:
    rows = [
        rollout_of(5, 6, cached_tokens=0),
        rollout_of(5, cached_tokens=2),
        rollout_of(5, prompt=1, cached_tokens=1),
        rollout_of(8, 9, 5, prompt=1, prefix=Prefix((8, 9), (0.0,) * 2, (0.0,) * 2, (1, 1), ())),
    ]
    assert usage(rows, 6) == {
        "prompt_tokens": 6,
        "completion_tokens": 2 + 1 + 1 + 1,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_a_reply_is_complete_where_each_row_came_to_its_own_end() -> None:
    whole = [rollout_of(5), rollout_of(END, stop=END)]
    assert is_complete(whole) and is_complete([])
    for reason in (FinishReason.ABORTED, FinishReason.SUPERSEDED, FinishReason.ERROR):
        assert not is_complete([*whole, rollout_of(5, finish_reason=reason)])


def test_headers_name_each_version_once_in_the_order_they_come() -> None:
    newer = PolicyVersion("policy", 8, "sha256:8")
    assert policy_headers([newer, VERSION, newer]) == {
        "x-policy": "policy@8, policy@7",
        "x-policy-digest": "sha256:8, sha256:7",
    }
    assert policy_headers([]) == {}


def test_only_a_fleet_says_how_many_replicas_have_a_version() -> None:
    status = VersionStatus(VERSION, "lora", "adapter", 2, 1, True, False, 0, 10, 0.0)
    policy = PolicyStatus("policy", None, (status,), 7)
    alone = policy_entry(policy, "policy")
    assert alone["live"] is None and "replicas" not in alone["versions"][0]
    replicas = [
        ReplicaStatus(str(at), "live", None, None, 0, 1, 0.0, held=frozenset(held))
        for at, held in enumerate([{("policy", 7)}, {("policy", 6), ("other", 7)}, set()])
    ]
    assert policy_entry(policy, "policy", replicas)["versions"][0]["replicas"] == {"staged": 1, "of": 3}
