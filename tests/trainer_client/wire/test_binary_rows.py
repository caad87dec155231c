"""Binary replies that are put together here, field by field: what makes a row, and what makes a reply that is none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from trainer_client.errors import BadReply
from trainer_client.wire.binary_rows import BinaryRows, ReplyFile

# Two rows of the first prompt, of three tokens and of none, and one of the second prompt, of two.
ARRAYS: dict[str, np.ndarray] = {
    "offsets": np.array([0, 3, 3, 5], np.int64),
    "token_ids": np.array([5, 6, 7, 8, 9], np.int32),
    "loss_mask": np.array([0, 1, 1, 1, 1], np.uint8),
    "logprobs": np.arange(5, dtype=np.float32),
    "prompt_index": np.array([0, 0, 1], np.int32),
    "sample_index": np.array([0, 1, 0], np.int32),
    "seed": np.array([1, 2**53 - 1, 3], np.int64),
    "finish_reason": np.array([0, 4, 1], np.uint8),
    "prompt_offsets": np.array([0, 2, 3], np.int64),
    "prompt_token_ids": np.array([1, 2, 3], np.int32),
    "span_offsets": np.array([0, 2, 2, 3], np.int64),
    "span_end": np.array([1, 3, 2], np.int64),
    "span_version": np.array([-1, 7, 8], np.int32),
    "span_kv": np.array([2, 1, 0], np.uint8),
}
ABOUT: dict[str, Any] = {
    "sampling": [{"max_tokens": 3}, {"max_tokens": 2}],
    "sampling_of": [0, 0, 1],
    "timings_ms": {"queued": [0.5, 1.5, 2.5]},
    "rows": {"1": {"error": {"code": "engine_fault", "message": "It broke."}}},
}
METADATA: dict[str, Any] = {
    "reply": {"rollouts": ABOUT},
    "policies": {"policy": {"7": {"digest": "sha256:7", "label": "a"}}, "other": {"8": {"digest": "sha256:8"}}},
    "ids": ["r/0/0", "r/0/1", "r/1/0"],
    "stop_reasons": [9, None, "x"],
    "prompt_ids": [None, "p-1"],
}


def about(**changes: Any) -> dict[str, Any]:
    return {"reply": {"rollouts": ABOUT | changes}}


def rows_of(metadata: dict[str, Any] | None = None, version: str = "1", **arrays: Any) -> BinaryRows:
    """The reply with some of its arrays (None: without it) and of its metadata in the place of the usual ones."""
    made = {name: array for name, array in (ARRAYS | arrays).items() if array is not None}
    texts = {name: json.dumps(value) for name, value in (METADATA | (metadata or {})).items() if value is not None}
    return BinaryRows(ReplyFile(bytearray(save(made, texts | {"format": version}))))


def test_a_row_is_its_part_of_every_array() -> None:
    first, empty, last = rows_of()
    assert (first.token_ids.tolist(), first.loss_mask.tolist()) == ([5, 6, 7], [0, 1, 1])
    assert (last.token_ids.tolist(), last.logprobs.tolist()) == ([8, 9], [3.0, 4.0])
    assert [row.prompt_token_ids.tolist() for row in (first, empty, last)] == [[1, 2], [1, 2], [3]]
    assert [row.finish_reason for row in (first, empty, last)] == ["stop", "error", "length"]
    assert [(row.seed, row.stop_reason, row.prompt_id) for row in (first, empty, last)] == [
        (1, 9, None),
        (2**53 - 1, None, None),
        (3, "x", "p-1"),
    ]
    assert [row.sampling["max_tokens"] for row in (first, empty, last)] == [3, 3, 2]
    assert [row.timings_ms for row in (first, last)] == [{"queued": 0.5}, {"queued": 2.5}]
    assert first.entropy is None and first.text is None and first.error is None
    assert empty.error is not None and empty.error.code == "engine_fault" and not len(empty.token_ids)


def test_spans_go_on_where_the_one_before_ended_and_begin_anew_in_each_row() -> None:
    first, empty, last = rows_of()
    assert [(span.policy, span.version, span.start, span.end, span.kv) for span in first.spans] == [
        (None, None, 0, 1, "recomputed"),
        ("policy", 7, 1, 3, "carried"),
    ]
    assert (first.spans[1].digest, first.spans[1].label) == ("sha256:7", "a")
    assert empty.spans == ()
    (span,) = last.spans
    assert (span.policy, span.digest, span.label, span.start, span.end, span.kv) == (
        "other", "sha256:8", None, 0, 2, None
    )  # fmt: skip


def test_a_row_is_made_once_and_its_arrays_are_the_reply_s() -> None:
    rows = rows_of()
    assert rows[-1] is rows[2] and rows[1:][1] is rows[2] and len(rows) == 3
    assert np.shares_memory(rows[0].token_ids, rows.per_token["token_ids"])
    with pytest.raises(IndexError):
        rows[3]


def test_digests_are_those_of_all_spans_and_none_for_tokens_without() -> None:
    assert rows_of().digests == {"sha256:7", "sha256:8", None}
    spans = [{"policy": "p", "version": 1, "digest": "sha256:1", "label": None, "start": 0, "end": 2}]
    assert "sha256:1" in rows_of(about(rows={"2": {"versions": spans}})).digests


def test_what_is_written_out_of_a_row_stands_in_the_place_of_its_arrays() -> None:
    written = {"2": {"logprobs": [-1.0, None], "entropy": None, "later": [1]}}
    (_, _, row) = rows_of(about(rows=written), entropy=np.full(5, np.nan, np.float32))
    assert row.logprobs[0] == -1.0 and np.isnan(row.logprobs[1])
    assert row.entropy is not None and np.isnan(row.entropy).all(), "an array that only others have stays NaN"
    assert row.raw == {"later": [1]}


def test_rewards_are_of_their_rows_and_of_the_model_that_the_reply_names() -> None:
    scores = np.array([[0.5], [np.nan], [1.5]], np.float32)
    model = {"name": "judge", "version": 0, "digest": "sha256:0"}
    failed = {"1": {"reward": {"error": {"code": "engine_fault", "message": "It broke."}}}}
    rows = rows_of(about(reward_model=model, rows=failed), reward=scores[:, 0].copy(), reward_scores=scores)
    assert [row.reward.value for row in (rows[0], rows[2]) if row.reward] == [0.5, 1.5]
    assert rows[0].reward is not None and rows[0].reward.version is not None
    assert rows[0].reward.version.digest == "sha256:0"
    assert rows[1].reward is not None and rows[1].reward.error is not None and rows[1].reward.value is None
    assert all(row.reward is None for row in rows_of())


def test_a_reply_without_a_row_is_one() -> None:
    none = np.array([0], np.int64)
    arrays: dict[str, Any] = {name: array[:0] for name, array in ARRAYS.items()}
    arrays |= {"offsets": none, "prompt_offsets": none, "span_offsets": none}
    rows = rows_of(about(sampling=[], sampling_of=[], timings_ms={}, rows=None) | {"policies": None}, **arrays)
    assert list(rows) == [] and rows.digests == set()


def array(dtype: Any, *values: int) -> np.ndarray:
    return np.array(values, dtype)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"token_ids": None}, "'token_ids' is missing"),
        ({"logprobs": np.zeros(5, np.float64)}, r"'logprobs' is float64\[5\]"),
        ({"logprobs": np.zeros((5, 1), np.float32)}, r"'logprobs' is float32\[5, 1\]"),
        ({"logprobs": np.zeros(4, np.float32)}, r"logprobs of shape \[4\], where \[5\] fits"),
        ({"seed": array(np.int64, 1, 2)}, r"seed of shape \[2\]"),
        ({"top_ids": np.zeros((5, 2), np.int32)}, "'top_logprobs' is missing"),
        ({"offsets": array(np.int64)}, "offsets that do not divide"),
        ({"offsets": array(np.int64, 1, 3, 3, 5)}, "offsets that do not divide"),
        ({"offsets": array(np.int64, 0, 4, 3, 5)}, "offsets that do not divide"),
        ({"span_offsets": array(np.int64, 0, 2, 2, 2)}, "span_offsets that do not divide"),
        ({"prompt_index": array(np.int32, 0, 0, 2)}, "rows of prompts that it does not hold"),
        ({"prompt_index": array(np.int32, 0, -1, 1)}, "rows of prompts that it does not hold"),
        ({"finish_reason": array(np.uint8, 0, 5, 0)}, "a finish_reason that this client does not know"),
        ({"span_kv": array(np.uint8, 0, 0, 3)}, "a span_kv that this client does not know"),
        ({"span_end": array(np.int64, 3, 3, 2)}, "do not tile"),
        ({"span_end": array(np.int64, 1, 2, 2)}, "do not tile"),
        ({"span_end": array(np.int64, 1, 3, 3)}, "do not tile"),
        ({"span_end": array(np.int64, 0, 3, 2)}, "do not tile"),
        ({"span_offsets": array(np.int64, 0, 2, 3, 3)}, "do not tile"),
    ],
)
def test_arrays_that_contradict_each_other_are_no_reply(arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(BadReply, match=said):
        rows_of(**arrays)


def test_what_is_no_file_or_of_a_later_format_is_no_reply() -> None:
    with pytest.raises(BadReply, match="not a safetensors file"):
        ReplyFile(b"{}")
    with pytest.raises(BadReply, match="format '2'"):
        rows_of(version="2")
    with pytest.raises(BadReply, match="'rollouts' is missing"):
        rows_of({"reply": {}})


@pytest.mark.parametrize("name", ["ids", "stop_reasons", "prompt_ids"])
def test_lists_are_as_long_as_what_they_are_of(name: str) -> None:
    for value in (None, METADATA[name][1:], {"0": "a"}):
        with pytest.raises(BadReply, match=name):
            rows_of({name: value})[0]
