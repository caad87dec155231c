"""What places cost those who leave and enter them: nothing is zeroed, copied or scattered that need not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.padded_layer import PaddedLayer, runs
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.rollout import FinishReason
from tests.support.engine.driver import Driver, prompts_of


@pytest.fixture
def driver(bare_model: Callable[[str], ResidentModel], qwen: Path) -> Driver:
    return Driver.start(qwen, bare_model("qwen3"), max_batch=4)


def store_of(driver: Driver) -> PaddedKV:
    store: PaddedKV = driver.batch(0).store
    return store


def filled(driver: Driver) -> list[bool]:
    """Of each place, whether any number in the first layer's keys is not zero."""
    keys = store_of(driver).layers[0].keys
    return [bool(any_) for any_ in np.array(mx.any(keys != 0, axis=(1, 2, 3)))]


def test_neighbouring_places_are_one_range() -> None:
    assert runs([]) == []
    assert runs([3]) == [(3, 4)]
    assert runs([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)]


def test_a_prompt_is_written_to_its_places_alone(driver: Driver) -> None:
    driver.submit(prompts_of([9], 286), n=4, max_tokens=4, ignore_eos=True)
    driver.until(lambda: len(driver.batches.rows) == 4)
    layer: PaddedLayer = store_of(driver).layers[0]
    assert layer.keys is not None and layer.values is not None
    shape = (layer.keys.shape[1], 5, layer.keys.shape[3])
    keys, values = mx.random.normal(shape), mx.random.normal(shape)
    before = np.array(layer.keys), np.array(layer.values)
    layer.fill([0, 2, 3], keys, values)
    for array, old, new in ((layer.keys, before[0], keys), (layer.values, before[1], values)):
        expected = old.copy()
        expected[[0, 2, 3], :, :5] = np.array(new)
        assert np.array_equal(np.array(array), expected)


@pytest.mark.parametrize("ending", ["length", "stop", "abort"])
def test_rows_whose_numbers_are_known_leave_their_places_as_they_are(driver: Driver, ending: str) -> None:
    """Zeroing them costs more than a step, and rows end by a stop token, or are aborted, with a step in flight."""
    prompt = prompts_of([9], 286)
    tokens = driver.generate(prompt, seed=3, max_tokens=8, ignore_eos=True)[0].token_ids
    stop = {"stop_token_ids": (tokens[4],)} if ending == "stop" else {}
    id = driver.submit(prompt, seed=3, max_tokens=5 if ending == "length" else 40, ignore_eos=True, **stop)
    driver.turn(4)
    if ending == "abort":
        driver.abort(id)
    driver.finish(id)
    driver.until(lambda: not driver.batches.active)
    reasons = {"length": FinishReason.LENGTH, "stop": FinishReason.STOP, "abort": FinishReason.ABORTED}
    assert driver.rollouts(id)[0].finish_reason is reasons[ending]
    assert all(filled(driver))


def test_a_place_that_no_step_has_computed_with_is_zeroed(
    bare_model: Callable[[str], ResidentModel], qwen: Path
) -> None:
    driver = Driver.start(qwen, bare_model("qwen3"), max_batch=4, prefill_tokens=16)
    id = driver.submit(prompts_of([60], 286), max_tokens=8, ignore_eos=True)
    driver.turn(2)
    assert driver.batches.joining and filled(driver) == [True]
    driver.abort(id)
    driver.finish(id)
    assert filled(driver) == [False]


def test_the_first_step_behind_a_prompt_copies_nothing(driver: Driver) -> None:
    """A prompt that fills its columns to the last would have all KV of its rows copied by their first step."""
    driver.submit(prompts_of([65], 286), n=4, max_tokens=40, ignore_eos=True)
    driver.until(lambda: len(driver.batches.rows) == 4)
    columns = store_of(driver).columns
    driver.turn(24)
    assert store_of(driver).columns == columns
