"""The parity tests of `test_batch` on every path there is through the engine: a row is what it is alone, and its
log-probabilities are the scorer's, whichever way it took. What is plain is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.attention.kernel import RowKernel
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.rollout import Rollout, Wants
from tests.engine.batch.test_batch import MIXED, assert_same, assert_scored, tolerance
from tests.laws.grids import some_long
from tests.support import tiny_models
from tests.support.engine.code_paths import (
    Classes,
    Compiled,
    OwnColumns,
    OwnColumnsCompiled,
    OwnColumnsCompiledPreempted,
    OwnColumnsCompiledPrefixHit,
    OwnColumnsPreempted,
    OwnColumnsPrefixHit,
    Preempted,
    PrefixHit,
    Settled,
    Way,
)
from tests.support.engine.driver import Driver, prompts_of
from tests.support.engine.loaded_models import loaded
from tests.support.numbers.bounds import TINY
from tests.support.numbers.host_kernels import host_compiler

CACHES = dict.fromkeys(["qwen3", "gemma3_text", "llama_sliding", "gpt_oss"], "slots")
CACHES |= {"granitemoehybrid": "batch", "gemma2": "serial"}
GPU_WAYS = (OwnColumnsPreempted, OwnColumnsPrefixHit, OwnColumnsCompiledPreempted, OwnColumnsCompiledPrefixHit)
WAYS: list[tuple[str, type[Way]]] = [
    *(("qwen3", way) for way in (Compiled, OwnColumns, OwnColumnsCompiled, Settled, Preempted, PrefixHit, Classes)),
    *(("gemma3_text", way) for way in (OwnColumns, Preempted, PrefixHit)),
    *(("granitemoehybrid", way) for way in (Settled, Preempted)),
    ("gemma2", Settled),
    *(("qwen3", way) for way in GPU_WAYS),
    *(("gpt_oss", way) for way in (OwnColumns, OwnColumnsCompiled, *GPU_WAYS)),
    *(("gemma3_text", way) for way in (OwnColumnsCompiled, *GPU_WAYS)),
    *(("llama_sliding", way) for way in (OwnColumns, OwnColumnsCompiled, *GPU_WAYS)),
]
ASKED = {"max_tokens": 8, "ignore_eos": True}
KERNEL_WAYS: list[tuple[str, type[OwnColumns]]] = [
    (family, way) for family in ("gpt_oss", "llama_sliding") for way in (OwnColumnsPreempted, OwnColumnsPrefixHit)
]
KERNEL_IDS = [f"{family}-{way.__name__}" for family, way in KERNEL_WAYS]
WIDE_HEADS = 64
WIDE = replace(TINY, width=tiny_models.SHARED["num_attention_heads"] * WIDE_HEADS)

IDS = [f"{family}-{way.__name__}" for family, way in WAYS]
GPU_SHORT: list[tuple[str, type[Way]]] = [
    ("qwen3", OwnColumnsPreempted),
    ("qwen3", OwnColumnsPrefixHit),
    ("gpt_oss", OwnColumns),
    ("gpt_oss", OwnColumnsPrefixHit),
    ("llama_sliding", OwnColumnsPreempted),
]
"""Those of a GPU that `make test` runs: windows, sinks, what is preempted and what is found again."""
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


@pytest.mark.parametrize(("family", "way"), some_long(WAYS, *WAYS[:9], WAYS[11], *GPU_SHORT), ids=IDS)
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


@pytest.mark.parametrize(("family", "way"), some_long(WAYS, *SCORED, *GPU_SHORT), ids=IDS)
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


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, ResidentModel, list[Rollout]]]:
    """Models with heads of a size that the kernel is written for, and rows of each alone under MLX's own attention."""
    folder = tmp_path_factory.mktemp("wide")

    @cache
    def made(family: str) -> tuple[Path, ResidentModel, list[Rollout]]:
        path = tiny_models.build(family, folder / family, head_dim=WIDE_HEADS)
        model = loaded(EngineOptions(str(path), family, max_batch=16))
        driver = Driver.start(path, model, prefix_cache=False)
        prompts = prompts_of(MIXED[7:16], model.info.vocab_size)
        return path, model, [driver.generate([p], seed=3 + i, **ASKED)[0] for i, p in enumerate(prompts)]

    return made


@pytest.mark.long
@pytest.mark.parametrize(("family", "way"), KERNEL_WAYS, ids=KERNEL_IDS)
def test_the_kernel_itself_gives_every_row_as_it_is_alone(
    family: str,
    way: type[OwnColumns],
    wide: Callable[[str], tuple[Path, ResidentModel, list[Rollout]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Its text for CUDA by the processor: it writes into the arrays in place, as the plain operations do not."""
    model_path, model, expected = wide(family)
    path = way(RowKernel("cuda", host_compiler(tmp_path_factory)))
    driver = path.start(model_path, model)
    found = path.generate(driver, [row.prompt_ids for row in expected], seeds=[[row.seed] for row in expected], **ASKED)
    within = tolerance(driver, expected, WIDE)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other, within)
