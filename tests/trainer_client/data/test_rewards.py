"""Rewards that came with rollouts: how they are asked for, and that every encoding gives a trainer the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rollout_server.http.replies.safetensors_file import rollouts_file
from rollout_server.schemas.rollouts import RolloutsRequest
from tests.trainer_client import contract
from trainer_client import BadReply, PolicyRef, RolloutBatch, RowFault
from trainer_client.verbs import sampling
from trainer_client.wire.parsing import parse_line, parse_reply
from trainer_client.wire.replies import Reply

MODEL = {"name": "rm", "version": 3, "digest": contract.OTHER_DIGEST}
VERSION = PolicyRef("rm", 3, contract.OTHER_DIGEST)
LATE = {"error": {"code": "timeout", "message": "The reward was not there."}}


def reward(*scores: float) -> dict[str, Any]:
    return {"value": scores[0] if len(scores) == 1 else None, "scores": list(scores), "model": MODEL}


def every_encoding(*rewards: Any) -> list[RolloutBatch]:
    """The same rows as JSON, as a file, and as lines in another order."""
    rows = [
        contract.row(index // 2, index % 2, (5, 6, 2)[: 1 + index], reward=own) for index, own in enumerate(rewards)
    ]
    content = contract.rollouts(*rows)
    binary = Reply(200, {"content-type": "application/vnd.safetensors"}, rollouts_file(content))
    lines = [parse_line(json.dumps(row).encode()) for row in rows]
    return [parse_reply(contract.reply(content)), parse_reply(binary), RolloutBatch.of(row for row in lines if row)]


def test_rewards_are_an_array_beside_the_rows() -> None:
    for batch in every_encoding(reward(0.5), LATE, reward(-2.0)):
        assert batch.rewards is not None and batch.reward_scores is not None
        assert batch.rewards.dtype == batch.reward_scores.dtype == np.float32
        np.testing.assert_array_equal(batch.rewards, [0.5, np.nan, -2.0])
        np.testing.assert_array_equal(batch.reward_scores, [[0.5], [np.nan], [-2.0]])
        first, late, last = (row.reward for row in batch)
        assert first is not None and late is not None and last is not None
        assert (first.value, first.version, first.error) == (0.5, VERSION, None)
        assert (late.value, late.error) == (None, RowFault("timeout", "The reward was not there."))
        assert last.scores == (-2.0,)
        padded = batch.padded()
        for index, row in enumerate(batch):
            start = batch.prompt_width
            width = len(row.token_ids)
            np.testing.assert_array_equal(padded["input_ids"][index, start : start + width], row.token_ids)
            assert padded["loss_mask"][index].sum() == width


def test_of_several_labels_there_is_no_value() -> None:
    for batch in every_encoding(reward(1.0, 2.0), LATE):
        assert batch.rewards is not None and batch.reward_scores is not None
        assert np.isnan(batch.rewards).all()
        np.testing.assert_array_equal(batch.reward_scores, [[1.0, 2.0], [np.nan, np.nan]])


def test_rows_without_rewards_have_no_arrays_of_them() -> None:
    for batch in every_encoding(None, None):
        assert batch.rewards is None and batch.reward_scores is None
        assert batch[0].reward is None
    for batch in every_encoding(LATE, LATE):
        assert batch.rewards is not None
        assert np.isnan(batch.rewards).all()
        assert batch[1].reward is not None and batch[1].reward.error is not None


def test_batches_are_joined_with_their_rewards() -> None:
    one, two, three = every_encoding(reward(0.5), reward(1.0))
    both = RolloutBatch.concatenate([one, two, three])
    assert both.rewards is not None
    np.testing.assert_array_equal(both.rewards, [0.5, 1.0] * 3)
    advantages = both.advantages(both.rewards)
    np.testing.assert_allclose(advantages[:2], -advantages[1::-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("rm", {"model": "rm"}),
        (VERSION, {"model": f"rm@{contract.OTHER_DIGEST}"}),
        (
            {"model": VERSION, "as": "text", "timeout_s": 2},
            {"model": f"rm@{contract.OTHER_DIGEST}", "as": "text", "timeout_s": 2},
        ),
    ],
)
def test_how_it_is_asked_for(given: Any, sent: dict[str, Any]) -> None:
    for call in (sampling.rollouts(["a"], reward=given), sampling.stream_rollouts(["a"], reward=given)):
        assert json.loads(bytes(call.body))["reward"] == sent
        RolloutsRequest.model_validate_json(bytes(call.body))
    assert "reward" not in json.loads(bytes(sampling.rollouts(["a"]).body))


@pytest.mark.parametrize("broken", [3, {}, {"scores": [1.0]}, {"scores": ["x"], "model": MODEL}])
def test_a_reward_that_is_none_is_named(broken: Any) -> None:
    with pytest.raises(BadReply, match="rollout of prompt 0, sample 0"):
        parse_reply(contract.reply(contract.rollouts(contract.row(reward=broken))))
