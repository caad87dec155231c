"""Rollouts as scored groups of Atropos: every token in its place, and nothing learned from what no policy wrote."""

from __future__ import annotations

import json

import numpy as np
import pytest

from examples.clients.atropos_groups import MASKED_ID, MASKED_LOGPROB, scored_groups
from tests.examples.as_written import run_example
from tests.support.live_server import Server
from tests.support.numbers.bounds import EMBEDDED
from trainer_client import RolloutBatch, RolloutClient, continued, rejoined

RETURNS = ("sampling_logprobs", "base_logprobs")


def test_a_row_with_a_tool_in_it_is_masked_there_and_scores_as_it_says(live: Server) -> None:
    tool = [20, 21, 22]
    with RolloutClient(live.url) as client:
        turns = client.rollouts(["17+25=", "4+4="], n=3, max_tokens=4, seed=0, ignore_eos=True, returns=RETURNS)
        plain = [float(at) for at in range(len(turns))]
        groups = scored_groups(turns, plain)
        longer = [continued(row, tool, max_tokens=len(row.token_ids) + len(tool) + 4) for row in turns[:1]]
        after = client.rollouts(longer, ignore_eos=True, returns=RETURNS)
        with pytest.raises(ValueError, match="rejoined"):
            scored_groups(RolloutBatch.of([*after, *after]), [0.0, 1.0])
        joined = rejoined(after, turns[:1])
        (group,) = scored_groups(RolloutBatch.of([*joined, *joined]), [0.0, 1.0])
        scored = client.logprobs(group["tokens"][:1])
    assert [group["scores"] for group in groups] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    (prompt, *_) = [row.prompt_token_ids.tolist() for row in turns]
    assert group["tokens"][0] == prompt + after[0].token_ids.tolist()
    learned = [MASKED_ID] * len(prompt)
    learned += [id if kept else MASKED_ID for id, kept in zip(after[0].token_ids, after[0].loss_mask, strict=True)]
    assert group["masks"][0] == learned and learned.count(MASKED_ID) == len(prompt) + len(tool)
    for name in ("inference_logprobs", "ref_logprobs"):
        values = np.array(group[name][0])
        kept = np.array(learned) != MASKED_ID
        assert (values[~kept] == MASKED_LOGPROB).all()
        within = EMBEDDED.of_logprobs(scored.logprobs, len(learned))
        assert np.abs(values[kept] - scored.logprobs[kept]).max() <= within
    assert {len(group[name][0]) for name in ("tokens", "masks", "advantages", "ref_logprobs")} == {len(learned)}


def test_what_cannot_be_learned_from_is_left_out(live: Server) -> None:
    with RolloutClient(live.url) as client:
        batch = client.rollouts(["17+25=", "4+4="], n=2, max_tokens=4)
        warm = client.rollouts(["17+25="], n=2, max_tokens=4, temperature=0.5)
    assert len(scored_groups(batch, [1.0, 1.0, 0.0, 1.0])) == 1
    with pytest.raises(ValueError, match="temperature"):
        scored_groups(warm, [0.0, 1.0])


def test_the_example_runs_as_written(live: Server) -> None:
    ran = run_example("examples/clients/atropos_groups.py", "--url", live.url, timeout_s=100)
    assert ran.returncode == 0, ran.stderr
    groups = [json.loads(line) for line in ran.stdout.splitlines()]
    assert groups and all(len(group["tokens"]) == 8 and 0 < sum(group["scores"]) < 8 for group in groups)
    assert all("ref_logprobs" in group and len(group["ref_logprobs"]) == 8 for group in groups)
