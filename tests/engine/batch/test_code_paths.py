"""The parity tests of `test_batch` on every path there is through the engine: a row is what it is alone, and its
log-probabilities are the scorer's, whichever way it took. What is plain is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout_server.engine.model.resident import ResidentModel
from rollout_server.rollout import Rollout, Wants
from tests.engine.batch.test_batch import MIXED, assert_same, assert_scored, tolerance
from tests.laws.grids import some_long
from tests.support.engine.code_paths import (
    Classes,
    Compiled,
    OwnColumns,
    OwnColumnsCompiled,
    Preempted,
    PrefixHit,
    Settled,
    Way,
)
from tests.support.engine.driver import Driver, prompts_of

CACHES = {"qwen3": "slots", "gemma3_text": "slots", "granitemoehybrid": "batch", "gemma2": "serial"}
WAYS: list[tuple[str, type[Way]]] = [
    *(("qwen3", way) for way in (Compiled, OwnColumns, OwnColumnsCompiled, Settled, Preempted, PrefixHit, Classes)),
    *(("gemma3_text", way) for way in (OwnColumns, Preempted, PrefixHit)),
    *(("granitemoehybrid", way) for way in (Settled, Preempted)),
    ("gemma2", Settled),
]
ASKED = {"max_tokens": 8, "ignore_eos": True}

IDS = [f"{family}-{way.__name__}" for family, way in WAYS]
SCORED = WAYS[:7:2]
"""Those whose log-probabilities `make test` compares with the scorer's."""


@pytest.fixture(scope="module")
def alone(
    bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> Callable[[str], list[Rollout]]:
    """Rows of mixed lengths, each generated with nothing beside it and nothing read before."""
    made: dict[str, list[Rollout]] = {}

    def rows(family: str) -> list[Rollout]:
        if family not in made:
            driver = Driver.start(model_path(family), bare_model(family), prefix_cache=False)
            prompts = prompts_of(MIXED[7:16], driver.model.info.vocab_size)
            made[family] = [driver.generate([p], seed=3 + i, **ASKED)[0] for i, p in enumerate(prompts)]
        return made[family]

    return rows


@pytest.mark.parametrize(("family", "way"), some_long(WAYS, *WAYS[:9], WAYS[11]), ids=IDS)
def test_rows_of_mixed_lengths_equal_each_alone(
    family: str,
    way: type[Way],
    alone: Callable[[str], list[Rollout]],
    bare_model: Callable[[str], ResidentModel],
    model_path: Callable[[str], Path],
) -> None:
    assert bare_model(family).info.cache == CACHES[family]
    expected, path = alone(family), way()
    driver = path.start(model_path(family), bare_model(family))
    found = path.generate(driver, [row.prompt_ids for row in expected], seeds=[[row.seed] for row in expected], **ASKED)
    within = tolerance(driver, expected)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other, within)


@pytest.mark.parametrize(("family", "way"), some_long(WAYS, *SCORED), ids=IDS)
def test_every_logprob_equals_the_scorer(
    family: str, way: type[Way], bare_model: Callable[[str], ResidentModel], model_path: Callable[[str], Path]
) -> None:
    path = way()
    driver = path.start(model_path(family), bare_model(family))
    prompts = prompts_of([5, 30, 100, 2], driver.model.info.vocab_size)
    wants = Wants(entropy=True, top_logprobs=3)
    rows = path.generate(driver, prompts, n=2, temperature=1.2, top_p=0.95, wants=wants, **ASKED)
    scored = driver.score(
        [row.prompt_ids + row.token_ids for row in rows],
        [len(row.prompt_ids) for row in rows],
        entropy=True,
        top_logprobs=3,
    )
    within = tolerance(driver, rows)
    for row, score in zip(rows, scored, strict=True):
        assert_scored(row, score, within)
