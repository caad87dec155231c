"""Rows that go on: what is sent, and how the reply is put together again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rollout_server.schemas.rollouts import RolloutsRequest
from tests.trainer_client import contract
from trainer_client import RolloutBatch, continued, rejoined
from trainer_client.verbs import sampling
from trainer_client.wire import call
from trainer_client.wire.parsing import parse_reply

ROWS = (
    contract.row(0, 0, (5, 6), finish_reason="aborted", prompt_id="p"),
    contract.row(0, 1, (7, 8, 9), finish_reason="aborted", versions=[contract.span(7, 0, 1), contract.span(8, 1, 3)]),
    contract.row(1, 0, (), finish_reason="aborted"),
)


def earlier() -> RolloutBatch:
    return parse_reply(contract.reply(contract.rollouts(*ROWS)))


def sent(call: call.Call[Any]) -> list[dict[str, Any]]:
    RolloutsRequest.model_validate_json(bytes(call.body))
    prompts: list[dict[str, Any]] = json.loads(bytes(call.body))["prompts"]
    return prompts


def test_rows_are_prompts() -> None:
    first, second, third = sent(sampling.rollouts(earlier(), policy="policy"))
    assert (first["token_ids"], first["seed"], first["id"]) == ([1, 3], ROWS[0]["seed"], "p")
    prefix = first["prefix"]
    assert prefix["token_ids"] == [5, 6] and prefix["loss_mask"] == [1, 1]
    assert np.float32(prefix["logprobs"]).tolist() == np.float32(ROWS[0]["logprobs"]).tolist()
    assert prefix["versions"] == [contract.span(7, 0, 2)]
    assert [span["version"] for span in second["prefix"]["versions"]] == [7, 8]
    assert "prefix" not in third and "id" not in second


def test_what_a_tool_said_is_masked_and_belongs_to_the_span_before() -> None:
    row = earlier()[1]
    (prompt,) = sent(sampling.rollouts([continued(row, np.array([40, 41]), max_tokens=64)]))
    prefix = prompt["prefix"]
    assert prefix["token_ids"] == [7, 8, 9, 40, 41] and prefix["loss_mask"] == [1, 1, 1, 0, 0]
    assert prefix["logprobs"][3:] == prefix["sampling_logprobs"][3:] == [None, None]
    assert [(span["start"], span["end"]) for span in prefix["versions"]] == [(0, 1), (1, 5)]
    assert prompt["max_tokens"] == 64
    only = continued(earlier()[2], [40])["prefix"]
    assert only["token_ids"] == [40] and "versions" not in only
    for wrong in ([[1]], ["x"], [1.5]):
        with pytest.raises(ValueError, match="token ids"):
            continued(row, wrong)


def test_rows_are_whole_again() -> None:
    before = earlier()
    replies = []
    for index, row in enumerate(ROWS):
        tokens, count = (*row["token_ids"], 70 + index), len(row["token_ids"])
        replies.append(
            contract.row(index, 0, tokens, log_kept_mass=[None] * count + [-0.5], loss_mask=[1] * (count + 1))
        )
    batch = parse_reply(contract.reply(contract.rollouts(*replies)))
    with pytest.raises(ValueError, match="without log_kept_mass"):
        batch.denominator("tempered")
    whole = rejoined(batch, before)
    assert whole.prompt_index.tolist() == [0, 0, 1] and whole.sample_index.tolist() == [0, 1, 0]
    assert whole.log_kept_mass is not None
    assert whole.log_kept_mass.tolist() == [-0.125, -0.125, -0.5, -0.125, -0.125, -0.125, -0.5, -0.5]
    assert not np.isnan(whole.denominator("tempered")).any()
    with pytest.raises(ValueError, match="3 rows"):
        rejoined(batch, list(before)[:2])
    with pytest.raises(ValueError, match="Row 0 does not begin"):
        rejoined(batch, [before[1], before[0], before[2]])
