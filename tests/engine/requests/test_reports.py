"""`return_when`: a group is over when enough of its samples have finished."""

from __future__ import annotations

from collections import Counter

import pytest

from rollout_server.rollout import FinishReason, Rollout, Wants
from tests.laws.grids import some_long
from tests.support.engine.driver import Driver, prompts_of

FINISHED = (FinishReason.STOP, FinishReason.LENGTH)


def kinds(rows: list[Rollout]) -> Counter[str]:
    return Counter("finished" if row.finish_reason in FINISHED else str(row.stop_reason) for row in rows)


def staggered(base: Driver, n: int) -> dict[str, object]:
    """Options under which samples end at different times: about a tenth of the tokens stop."""
    return {"n": n, "stop_token_ids": tuple(range(0, base.model.info.vocab_size, 12)), "max_tokens": 200, "seed": 3}


def test_the_rest_comes_back_as_it_is(base: Driver) -> None:
    (prompt,) = prompts_of([5], base.model.info.vocab_size)
    whole = base.generate([prompt], **staggered(base, 8))
    ends = sorted(len(row.token_ids) for row in whole)
    rows = base.generate([prompt], return_when=3, **staggered(base, 8))
    found = kinds(rows)
    # those that end in the step of the third are finished too
    assert found["finished"] == sum(end <= ends[2] for end in ends) and found["finished"] < 8
    assert found["return_when"] == 8 - found["finished"]
    for row, full in zip(rows, whole, strict=True):
        assert row.token_ids == full.token_ids[: len(row.token_ids)]
        if row.finish_reason is FinishReason.ABORTED:
            assert 0 < len(row.token_ids) <= ends[2]
            assert row.spans[-1].end == len(row.token_ids)
    base.turn(2)
    assert base.status.running == 0


def test_samples_that_never_began(base: Driver) -> None:
    base.set_max_rows(2)
    prompts = prompts_of([5, 6], base.model.info.vocab_size)
    rows = base.generate(prompts, n=6, max_tokens=4, ignore_eos=True, return_when=3)
    assert [(row.prompt_index, row.sample_index) for row in rows] == [(p, s) for p in range(2) for s in range(6)]
    for index in range(2):
        own = [row for row in rows if row.prompt_index == index]
        assert kinds(own) == {"finished": 4, "return_when": 2}
        assert [row.token_ids for row in own if row.stop_reason == "return_when"] == [(), ()]
    base.turn(3)
    assert base.batches.size == 0


def test_each_prompt_counts_for_itself(base: Driver) -> None:
    prompts = prompts_of([5, 40, 9], base.model.info.vocab_size)
    rows = base.generate(prompts, return_when=2, **staggered(base, 5))
    for index in range(3):
        assert kinds([row for row in rows if row.prompt_index == index])["finished"] >= 2


def test_it_waits_for_what_was_asked_for(driver: Driver) -> None:
    driver.push("policy", driver.bundle(1))
    (prompt,) = prompts_of([5], driver.model.info.vocab_size)
    wants = Wants(base_logprobs=True, prompt_logprobs=True)
    rows = driver.generate([prompt], policy="policy", wants=wants, return_when=2, **staggered(driver, 6))
    assert kinds(rows)["return_when"] > 0
    for row in rows:
        assert row.base_logprobs is not None and len(row.base_logprobs) == len(row.token_ids)
        assert row.prompt_logprobs is not None
    driver.turn(3)
    status = next(policy for policy in driver.status.policies if policy.name == "policy")
    assert [version.rows_in_use for version in status.versions] == [0]


@pytest.mark.parametrize("max_batch", some_long([1, 3, 64], 3))
def test_aborts_and_ends_in_any_order(base: Driver, max_batch: int) -> None:
    """However the two meet, every sample is reported once and nothing stays behind."""
    base.set_max_rows(max_batch)
    prompts = prompts_of([5, 90, 6], base.model.info.vocab_size)
    for turns in range(1, 40, 3):
        id = base.submit(prompts, return_when=1, **staggered(base, 4))
        base.turn(turns)
        base.abort(id)
        base.finish(id)
        assert len(base.rollouts(id)) == 12
    base.turn(3)
    assert base.batches.size == 0 and not base.requests.open_requests
