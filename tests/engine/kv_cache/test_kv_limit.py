"""KV memory that is hardly enough: somebody always gets on, a group's prompt is read once, and all stays inside."""

from __future__ import annotations

import gc
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from rollout_server.engine.batch.length_buckets import StepCosts
from rollout_server.engine.messages.control import Release
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.scoring.reader import LEAST_BYTES, SLICES
from rollout_server.rollout import Wants
from tests.engine.batch.test_batch import assert_same, tolerance
from tests.engine.scheduling.test_preemption import small
from tests.laws.grids import some_long
from tests.support import tiny_models
from tests.support.engine.driver import Driver, prompts_of
from tests.support.engine.loaded_models import loaded

ASK = {"ignore_eos": True}


@pytest.mark.parametrize("apart", some_long(["classes", "sets"], "classes"))
def test_a_group_whose_only_row_was_preempted_holds_nobody_up(base: Driver, qwen: Path, apart: str) -> None:
    """Its row and a copy of its prompt would never fit together, and nothing else runs."""
    driver = small(qwen, base.model, 1000) if apart == "classes" else Driver.start(qwen, prefix_cache=False)
    if apart == "classes":
        driver.set_step_costs(StepCosts(0.0, 1.0))
    else:
        driver.set_kv_limit(1000)
        driver.push("m", driver.bundle(1), mode="merged")
    older = driver.submit(prompts_of([20], 286), max_tokens=150, **ASK)
    driver.turn(5)
    policy = "base" if apart == "classes" else "m"
    group = driver.submit(prompts_of([600], 286, seed=1), n=2, max_tokens=30, policy=policy, **ASK)
    driver.finish(older, group, driver.submit(prompts_of([5], 286), max_tokens=3), turns=600)


@pytest.mark.long
@pytest.mark.parametrize("seed", [102, 124])
def test_every_request_of_a_mixed_load_in_tiny_memory_ends(base: Driver, qwen: Path, seed: int) -> None:
    """These two once stood still for ever."""
    dice = random.Random(seed)
    rows, chunk, cells = dice.choice([4, 16]), dice.choice([16, 200]), dice.choice([300, 500, 900])
    driver = Driver.start(
        qwen,
        max_batch=rows,
        prefill_tokens=chunk,
        kv_memory=cells * base.model.info.kv_bytes_per_token,
        prefix_cache=dice.random() < 0.5,
    )
    driver.set_step_costs(dice.choice([StepCosts(0.0, 1.0), StepCosts(1.0, 0.0), StepCosts(30.0, 1.0)]))
    driver.push("p", driver.bundle(1))
    driver.push("mm", driver.bundle(2), mode="merged")
    ids: list[str] = []
    for number in range(12):
        policy, length, n = (
            dice.choice(["base", "p", "mm"]),
            dice.choice([3, 20, 60, 150, 200]),
            dice.choice([1, 1, 2, 4]),
        )
        asked: dict[str, Any] = {
            "wants": Wants(base_logprobs=dice.random() < 0.2, prompt_logprobs=dice.random() < 0.2),
            "max_tokens": dice.choice([5, 30, 60]),
            "on_update": dice.choice(["finish", "switch"]) if policy != "base" else "finish",
            "return_when": dice.choice([None, None, 1]),
        }
        ids.append(driver.submit(prompts_of([length], 286, seed=number), n=n, policy=policy, **ASK, **asked))
        if dice.random() < 0.2:
            ids.append(driver.ask_score(prompts_of([dice.choice([10, 120, 280])], 286)))
        driver.turn(dice.randrange(1, 12))
        if dice.random() < 0.15:
            driver.push("p", driver.bundle(number + 3), mode=dice.choice(["adapter", "merged"]))
        if dice.random() < 0.1:
            driver.abort(dice.choice(ids))
    driver.until(lambda: all(driver.over(id) or driver.is_scored(id) for id in ids), 2000)
    faults = [driver.error(id) for id in ids if driver.error(id) and "ended" not in str(driver.error(id))]
    assert not faults and driver.requests.kept_cells() == 0


@pytest.mark.parametrize("cells", some_long([4 * 256, 1 * 256], 1 * 256), ids=["four rows", "one row"])
def test_a_prompt_is_read_once_however_few_samples_fit_at_a_time(base: Driver, qwen: Path, cells: int) -> None:
    prompt = prompts_of([200], 286)
    expected = base.generate(prompt, n=7, max_tokens=20, **ASK)
    driver = small(qwen, base.model, cells, prefix_cache=False)
    id = driver.submit(prompt, n=7, max_tokens=20, **ASK)
    while not driver.over(id):
        driver.turn()
        assert driver.batches.nbytes <= driver.model.info.kv_memory
    assert driver.batches.prefilled == 199 and driver.preemptions == 0
    for one, other in zip(expected, driver.rollouts(id), strict=True):
        assert_same(one, other, tolerance(base, [one]))


@pytest.mark.parametrize(
    "costs",
    [pytest.param(StepCosts(1.0, 0.0), marks=pytest.mark.long), StepCosts(0.0, 1.0)],
    ids=["one class", "classes"],
)
def test_samples_take_their_prompt_from_those_that_run(base: Driver, qwen: Path, costs: StepCosts) -> None:
    prompts = prompts_of([90, 40], 286)
    asked: dict[str, Any] = {"n": 7, "seed": 3, "max_tokens": 40, "stop_token_ids": tuple(range(0, 286, 12)), **ASK}
    expected = base.generate(prompts, **asked)
    assert len({len(row.token_ids) for row in expected}) > 3, "samples end one by one"
    driver = Driver.start(qwen, base.model, max_batch=3, prefix_cache=False)
    driver.set_step_costs(costs)
    rows = driver.generate(prompts, **asked)
    # A place that was left in a class without rows is gone with it.
    assert driver.batches.prefilled <= (89 + 39) * (1 if costs.weights else 2)
    for one, other in zip(expected, rows, strict=True):
        assert_same(one, other, tolerance(base, [one]))


def test_a_sample_takes_no_prompt_that_another_version_read(driver: Driver, qwen: Path) -> None:
    """A row that was read anew under a later version has the prompt as that one reads it."""
    driver = Driver.start(qwen, driver.model, max_batch=1, prefill_tokens=16, prefix_cache=False)
    driver.push("p", driver.bundle(1))
    prompt = prompts_of([60], 286)
    asked: dict[str, Any] = {"n": 2, "policy": "p", "max_tokens": 10, "on_update": "switch", **ASK}
    id = driver.submit(prompt, **asked)
    driver.turn(2)
    driver.push("p", driver.bundle(2))
    driver.finish(id)
    for row in driver.rollouts(id):
        (again,) = driver.replay([row])
        assert again.first_difference is None, row.spans


def test_states_that_cannot_be_cut_keep_their_prompt_only_where_there_is_room(bare_model: Any, model_path: Any) -> None:
    model = bare_model("falcon_h1")
    asked: dict[str, Any] = {"n": 3, "max_tokens": 12, **ASK}
    prompt = prompts_of([60], model.info.vocab_size)
    for rows, read in ((1.2, 3 * 59), (2.2, 59)):
        limit = int(rows * model.info.row_bytes(72))
        info = replace(model.info, kv_memory=limit, max_batch=1)
        driver = Driver.start(model_path("falcon_h1"), replace(model, info=info))
        driver.finish(driver.submit(prompt, **asked), turns=300)
        assert driver.batches.prefilled == read and driver.preemptions == 0


def test_memory_given_back_while_a_merged_version_served_last_leaves_the_engine_whole(driver: Driver) -> None:
    """The base's batch went when the version's was opened, the version's with the memory."""
    driver.push("m", driver.bundle(2), mode="merged")
    driver.generate(prompts_of([20], 286), max_tokens=5, policy="m")
    driver.turn(2)
    driver.send(Release("x"))
    driver.turn(2)
    assert len(driver.generate(prompts_of([20], 286), max_tokens=5, **ASK)[0].token_ids) == 5


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ResidentModel]:
    """A model whose logits weigh more than its KV, as real ones do."""
    path = tiny_models.build("qwen3", tmp_path_factory.mktemp("wide"), vocab_size=16384, num_hidden_layers=1)
    model = loaded(EngineOptions(str(path), "wide", max_batch=16))
    return path, replace(model, info=replace(model.info, kv_memory=4 * 2**20))


@pytest.mark.parametrize("what", some_long(["a group", "scores beside rows"], "scores beside rows"))
def test_the_peak_is_weights_and_kv_memory_and_what_a_forward_computes_with(
    wide: tuple[Path, ResidentModel], what: str
) -> None:
    path, model = wide
    gc.collect()
    driver = Driver.start(path, model, prefill_tokens=256)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    vocabulary, rows = model.info.vocab_size, model.info.max_batch
    ids = [driver.submit(prompts_of([400], vocabulary), n=rows + 8, max_tokens=10, **ASK)]
    if what != "a group":
        ids.append(driver.ask_score(prompts_of([700] * 2, vocabulary), entropy=True, top_logprobs=3))
    driver.until(lambda: all(driver.over(id) or driver.is_scored(id) for id in ids))
    # Six copies of a step's float32 logits; of what is scored one, and seven of a slice.
    logits = 6 * rows * vocabulary * 4
    scored = LEAST_BYTES * (1 + 7 / SLICES) if what != "a group" else 0
    # The one layer's values of every token whose logits may be alive: a weight of each head for each of 700 columns,
    # rounded up, and less than ten vectors as wide as the feed-forward's.
    args, tokens, columns = model.module.args, LEAST_BYTES // (4 * vocabulary), 768
    layer = tokens * (args.num_attention_heads * columns + 10 * args.intermediate_size) * 4
    assert mx.get_peak_memory() - before <= model.info.kv_memory + max(logits, scored) + layer


def test_what_is_scored_and_kept_for_samples_that_wait_has_its_parts(
    base: Driver, bare_model: Any, model_path: Any
) -> None:
    id = base.ask_score(prompts_of([900], 286))
    base.turn()
    assert base.memory_now().kv_scored == base.scored_rows.nbytes > 0
    base.scored(id)
    assert base.memory_now().kv_scored == 0
    slow = bare_model("falcon_h1")
    driver = Driver.start(model_path("falcon_h1"), slow, max_batch=1)
    id = driver.submit(prompts_of([20], slow.info.vocab_size), n=2, max_tokens=5, **ASK)
    driver.until(lambda: bool(driver.batches.rows))
    prompts = driver.memory_now().kv_prompts
    assert 19 * slow.info.kv_bytes_per_token < prompts <= slow.info.row_bytes(20)
    driver.finish(id)
    assert driver.memory_now().kv_prompts == 0
