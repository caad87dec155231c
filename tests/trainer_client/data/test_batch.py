from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.trainer_client import contract
from trainer_client.data.advantages import Denominator
from trainer_client.data.batch import RolloutBatch
from trainer_client.wire.json_rows import parse_rollout
from trainer_client.wire.parsing import parse_reply


def batch(*rows: dict[str, Any], **fields: Any) -> RolloutBatch:
    return parse_reply(contract.reply(contract.rollouts(*rows, **fields)))


def test_rows_are_views_of_the_flat_arrays() -> None:
    given = batch(contract.row(0, 0, (5, 6, 2)), contract.row(0, 1, ()), contract.row(1, 0, (9,)))
    np.testing.assert_array_equal(given.offsets, [0, 3, 3, 4])
    np.testing.assert_array_equal(given.token_ids, [5, 6, 2, 9])
    np.testing.assert_array_equal(given.lengths, [3, 0, 1])
    for name in ("token_ids", "logprobs", "sampling_logprobs", "log_kept_mass", "loss_mask"):
        for row in (0, 2):
            assert np.shares_memory(getattr(given[row], name), getattr(given, name)), name
    arrays = (given.offsets, given.token_ids, given.loss_mask, given.logprobs, given.seeds)
    assert [array.dtype for array in arrays] == [np.int64, np.int32, np.uint8, np.float32, np.int64]
    np.testing.assert_array_equal(given.prompt_index, [0, 0, 1])
    np.testing.assert_array_equal(given.sample_index, [0, 1, 0])
    assert given.seeds.tolist() == [2**53 - 1, 2**53 - 2, 2**53 - 1]
    assert (len(given), len(list(given)), given.texts[0], given.finish_reasons[2]) == (3, 3, "ab", "stop")


def test_a_selection_and_a_stream_make_the_same_batch_as_a_reply() -> None:
    rows = [contract.row(0, 0), contract.row(0, 1, (7, 2)), contract.row(1, 0, (9,))]
    whole = batch(*rows)
    streamed = RolloutBatch.of(parse_rollout(row) for row in rows)
    np.testing.assert_array_equal(streamed.logprobs, whole.logprobs)
    assert streamed.complete
    assert not RolloutBatch.of([parse_rollout(contract.row(finish_reason="aborted"))]).complete
    chosen = RolloutBatch.of([whole[2], whole[1]])
    np.testing.assert_array_equal(chosen.token_ids, [9, 7, 2])
    assert not np.shares_memory(chosen.token_ids, whole.token_ids)


def test_an_array_nobody_asked_for_is_none_and_a_mixed_one_is_nan() -> None:
    asked, not_asked = contract.row(entropy=[1.0, 2.0, None]), contract.row(0, 1)
    assert batch(not_asked).entropy is None
    mixed = batch(asked, not_asked).entropy
    np.testing.assert_array_equal(mixed, np.array([1, 2, np.nan, np.nan, np.nan, np.nan], np.float32))


def test_concatenated_replies_keep_their_groups_apart() -> None:
    first = batch(contract.row(0, 0), contract.row(1, 0))
    second = batch(contract.row(0, 0), contract.row(0, 1))
    joined = RolloutBatch.concatenate([first, second])
    np.testing.assert_array_equal(joined.prompt_index, [0, 1, 2, 2])
    assert joined.instance == contract.INSTANCE
    np.testing.assert_array_equal(joined.advantages([1, 1, 0, 1], scale_by_std=False), [0, 0, -0.5, 0.5])
    elsewhere = batch(contract.row(), instance="another")
    assert RolloutBatch.concatenate([first, elsewhere]).instance is None
    assert len(RolloutBatch.concatenate([])) == 0


def test_values_per_row_spread_over_tokens() -> None:
    given = batch(contract.row(0, 0, (5, 6)), contract.row(0, 1, (7,)))
    np.testing.assert_array_equal(given.per_token(np.array([1.5, -1.0])), [1.5, 1.5, -1.0])
    assert given.sequences == [
        {"token_ids": [1, 3, 5, 6], "start": 2},
        {"token_ids": [1, 3, 7], "start": 2},
    ]


# ---- padded -------------------------------------------------------------------------------------------------------


def ragged() -> RolloutBatch:
    return batch(
        contract.row(0, 0, (5, 6, 2), prompt_token_ids=[1]),
        contract.row(1, 0, (7,), prompt_token_ids=[1, 8, 9], loss_mask=[0], logprobs=[None]),
    )


def test_prompts_are_padded_on_the_left_and_completions_on_the_right() -> None:
    given = ragged()
    padded = given.padded(pad_token_id=99)
    assert given.prompt_width == 3
    np.testing.assert_array_equal(padded["input_ids"], [[99, 99, 1, 5, 6, 2], [1, 8, 9, 7, 99, 99]])
    np.testing.assert_array_equal(padded["attention_mask"], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(padded["position_ids"], [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 3]])
    np.testing.assert_array_equal(padded["completion_mask"], [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(padded["loss_mask"], [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(padded["logprobs"], [[0, 0, 0, -0.55, -0.56, -0.52], [0, 0, 0, np.nan, 0, 0]])
    assert {name for name, array in padded.items() if array.dtype == np.float32} == {
        "logprobs", "sampling_logprobs", "log_kept_mass"
    }  # fmt: skip
    assert {array.dtype for array in padded.values()} == {np.dtype("i4"), np.dtype("f4")}


def test_all_padding_can_go_to_the_right() -> None:
    padded = ragged().padded(pad_token_id=99, prompt_padding="right")
    np.testing.assert_array_equal(padded["input_ids"], [[1, 5, 6, 2], [1, 8, 9, 7]])
    np.testing.assert_array_equal(padded["completion_mask"], [[0, 1, 1, 1], [0, 0, 0, 1]])
    np.testing.assert_array_equal(padded["position_ids"], [[0, 1, 2, 3], [0, 1, 2, 3]])


def test_an_empty_batch_and_an_empty_row_pad_to_something() -> None:
    assert batch().padded()["input_ids"].shape == (0, 0)
    padded = batch(contract.row(0, 0, ()), contract.row(0, 1, (7,))).padded()
    np.testing.assert_array_equal(padded["input_ids"], [[1, 3, 0], [1, 3, 7]])
    assert padded["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


# ---- denominators -------------------------------------------------------------------------------------------------


def test_each_denominator_is_what_the_contract_says() -> None:
    given = batch(contract.row())
    np.testing.assert_array_equal(given.denominator("filtered"), given.sampling_logprobs)
    np.testing.assert_array_equal(given.denominator(Denominator.TEMPERED), np.full(3, -0.375, np.float32))
    assert given.denominator("unmodified") is given.logprobs
    with pytest.raises(ValueError, match="is not a valid Denominator"):
        given.denominator("raw")


@pytest.mark.parametrize(
    "changed",
    [{"temperature": 0.7}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"min_tokens": 2}],
)
def test_logprobs_are_no_denominator_when_something_else_was_sampled_from(changed: dict[str, Any]) -> None:
    row = contract.row()
    given = batch(contract.row(), {**row, "sample_index": 1, "sampling": {**row["sampling"], **changed}})
    with pytest.raises(ValueError, match=f"Row 1 was sampled with {next(iter(changed))}="):
        given.denominator(Denominator.UNMODIFIED)
    assert given.denominator(Denominator.FILTERED) is not None


def test_greedy_rows_have_no_tempered_ratio() -> None:
    greedy = contract.row(0, 1, sampling_logprobs=[0.0] * 3, log_kept_mass=[None] * 3)
    given = batch(contract.row(), greedy)
    assert given.denominator("filtered")[-1] == 0.0
    with pytest.raises(ValueError, match="Row 1 has sampled tokens without log_kept_mass"):
        given.denominator("tempered")


def test_a_missing_value_in_a_prefix_is_no_fault() -> None:
    given = batch(contract.row(loss_mask=[0, 1, 1], sampling_logprobs=[None, -1.0, -1.0]))
    np.testing.assert_array_equal(np.isnan(given.denominator("filtered")), [True, False, False])


def test_a_denominator_that_was_not_asked_for_says_how_to_ask() -> None:
    given = batch(contract.row(sampling_logprobs=None, log_kept_mass=None))
    with pytest.raises(ValueError, match="returns="):
        given.denominator("filtered")


def test_batches_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch(contract.row()).token_ids = np.zeros(1, np.int32)  # type: ignore[misc]
