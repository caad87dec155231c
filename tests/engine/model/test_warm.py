"""Shapes of a first batch are run before it: few occur, a second batch compiles none, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.kv_cache.sizes import few_columns, few_widths
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model import warm
from rollout_server.engine.model.load import load
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.model.warm import USUAL_RANK, WarmUp, chunks, nothing, shapes, widths
from rollout_server.rollout import Rollout
from tests.support import tiny_models
from tests.support.engine.code_paths import with_own_columns
from tests.support.engine.driver import Driver

needs_compiler = pytest.mark.skipif(
    mx.default_device() == mx.cpu and not shutil.which("g++"), reason="MLX compiles for the CPU with g++"
)
LIMITS = {"max_batch": 4, "context_length": 127, "prefill_tokens": 256}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("warm") / "model")


@pytest.fixture(scope="module")
def model(path: Path) -> ResidentModel:
    return load(EngineOptions(str(path), "tiny", compile_decode=True, **LIMITS))


@pytest.fixture
def driver(path: Path, model: ResidentModel) -> Iterator[Driver]:
    driver = Driver.start(path, model, max_batch=4, prefill_tokens=256)
    yield driver
    driver.resident.slots.unmount()


def warm_up(driver: Driver, weights_memory: int | None = None, clock: Callable[[], float] = lambda: 0.0) -> WarmUp:
    traces, policies = driver.traces(driver.batch(0)), driver.policies
    return WarmUp(driver.model, policies.routed, policies.router(0), traces, 10**6, weights_memory, clock)


def a_batch(driver: Driver, policy: str, seed: int, *, longest: int) -> list[Rollout]:
    """As a trainer asks for it: two prompts of unlike lengths, two samples each."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(300) for _ in range(length)] for length in (longest - 9, longest)]
    return driver.generate(prompts, n=2, policy=policy, seed=seed, max_tokens=40, ignore_eos=True, top_p=0.9)


def traced(driver: Driver, run: Callable[[], object]) -> int:
    """How many steps are traced while it runs."""
    traces = driver.traces(driver.batch(0))
    before = traces.made
    run()
    return traces.made - before


@needs_compiler
def test_a_second_batch_of_other_lengths_and_a_push_trace_nothing(driver: Driver) -> None:
    assert traced(driver, lambda: a_batch(driver, "base", 1, longest=50)) > 0
    assert traced(driver, lambda: a_batch(driver, "base", 2, longest=56)) == 0
    driver.push("policy", driver.bundle(1, rank=8))
    assert traced(driver, lambda: a_batch(driver, "policy", 3, longest=52)) > 0
    for seed in range(2, 4):
        driver.push("policy", driver.bundle(seed, rank=8))
        assert traced(driver, lambda seed=seed: a_batch(driver, "policy", seed, longest=49 + seed)) == 0
    assert traced(driver, lambda: a_batch(driver, "base", 9, longest=51)) == 0, (
        "layers are wrapped, and nobody reads it"
    )


@needs_compiler
def test_after_a_warm_up_the_first_batch_traces_nothing(driver: Driver) -> None:
    warm = warm_up(driver)
    assert warm.run() == len(shapes(4, 127, 10**6)) == 3
    assert traced(driver, lambda: a_batch(driver, "base", 1, longest=70)) == 0
    driver.push("policy", driver.bundle(1, rank=USUAL_RANK))
    assert traced(driver, lambda: a_batch(driver, "policy", 2, longest=40)) == 0


@needs_compiler
def test_where_each_row_reads_its_own_columns_an_array_is_one_shape(path: Path, model: ResidentModel) -> None:
    driver = Driver.start(path, with_own_columns(model), max_batch=4, prefill_tokens=256)
    # Three numbers of rows, one of columns, with a version and without.
    assert traced(driver, lambda: warm_up(driver).run()) == 3 * 2
    assert traced(driver, lambda: a_batch(driver, "base", 1, longest=70)) == 0
    driver.push("policy", driver.bundle(1, rank=USUAL_RANK))
    assert traced(driver, lambda: a_batch(driver, "policy", 2, longest=40)) == 0
    driver.resident.slots.unmount()


@needs_compiler
def test_a_warm_up_leaves_everything_as_it_was(driver: Driver, path: Path, model: ResidentModel) -> None:
    parameters = [(name, id(array)) for name, array in tree_flatten(model.module.parameters())]
    layers = [type(layer) for _, layer in model.module.named_modules()]
    mx.clear_cache()
    held = mx.get_active_memory()
    warm_up(driver).run()
    assert [(name, id(array)) for name, array in tree_flatten(model.module.parameters())] == parameters
    assert [type(layer) for _, layer in model.module.named_modules()] == layers
    assert driver.policies.routed.nbytes == driver.policies.routed.slots_in_use == 0
    assert driver.batches.nbytes == 0 and driver.memory_now().kv_kept == 0
    gc.collect()
    assert mx.get_active_memory() - held < model.info.row_bytes(127)
    cold = Driver.start(path, model, max_batch=4, prefill_tokens=256)
    found = []
    for each in (driver, cold):
        rows = a_batch(each, "base", 4, longest=33)
        each.push("policy", each.bundle(5, rank=12, dora=True))
        rows += a_batch(each, "policy", 4, longest=33)
        each.resident.slots.unmount()
        found.append([(row.token_ids, row.logprobs, row.sampling_logprobs) for row in rows])
    assert found[0] == found[1]
    assert (driver.status.steps, driver.status.tokens) == (cold.status.steps, cold.status.tokens)


@needs_compiler
def test_a_warm_up_is_bounded_in_time_and_says_how_far_it_is(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 3.0
        return now[0]

    with caplog.at_level("INFO"):
        assert warm_up(driver, clock=clock).run(seconds=60.0) == 1
        assert warm_up(driver).run(lambda: True) == 0, "somebody wants the engine to stop"
        assert warm_up(driver).run(seconds=0.0) == 0
    said = [record.getMessage() for record in caplog.records]
    assert "0 of 3 shapes in 6 s" in said and "1 of 3 shapes in 54 s" in said
    # A forward that begins in time is finished after it.
    assert "Ran 1 of 3 shapes in 63.0 s." in said
    others = "1 row × 160 columns; 2 rows × 160 columns"
    why = "No more were run, since {} s are over. Rows that come to one of the others wait until it is compiled: {}."
    stopped = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert stopped == [why.format(60, others), why.format(0, f"{others}; 4 rows × 160 columns")]


@needs_compiler
def test_a_warm_up_is_bounded_in_traces(
    driver: Driver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = driver.traces(driver.batch(0)).made + 1
    monkeypatch.setattr(warm, "MOST_TRACES", most)
    assert warm_up(driver).run() < 3
    assert f"No more were run, since {most} steps are traced." in caplog.text


@needs_compiler
def test_a_warm_up_that_ran_everything_says_nothing_of_what_is_left(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    with caplog.at_level("INFO"):
        assert warm_up(driver, clock=clock).run(seconds=60.0) == 3
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@needs_compiler
def test_what_fails_in_a_warm_up_is_left_to_whoever_meets_it(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    traces, policies = driver.traces(driver.batch(0)), driver.policies
    routed: list[Sequence[int]] = []

    def failing(slots: Sequence[int]) -> None:
        routed.append(slots)
        if any(slots):
            raise RuntimeError("out of memory")

    assert WarmUp(driver.model, policies.routed, failing, traces, 10**6).run() == 0
    assert "could not be run before it (out of memory)" in caplog.text
    assert routed[-1] == [0] and policies.routed.slots_in_use == 0
    assert a_batch(driver, "base", 1, longest=20)


@needs_compiler
def test_no_version_is_staged_where_none_fits(driver: Driver) -> None:
    version = nothing(driver.model.info, USUAL_RANK)
    assert version is not None
    slots = driver.policies.routed
    assert slots.nbytes_with(version.bundle) > 1
    before = driver.traces(driver.batch(0)).made
    assert warm_up(driver, weights_memory=1).run() == 3
    without = driver.traces(driver.batch(0)).made - before
    assert without > 0 and slots.nbytes == 0


@pytest.mark.parametrize(("compiles", "warm"), [(True, True), (True, False), (False, True)])
def test_a_server_is_ready_when_it_is_warm(
    path: Path, caplog: pytest.LogCaptureFixture, compiles: bool, warm: bool
) -> None:
    if compiles and mx.default_device() == mx.cpu and not shutil.which("g++"):
        pytest.skip("MLX compiles for the CPU with g++")
    limits = LIMITS | {"max_batch": 1, "context_length": 100}
    options = EngineOptions(str(path), "tiny", compile_decode=compiles, warm=warm, **limits)

    async def run() -> list[str]:
        handle = EngineHandle(options)
        handle.start()
        await handle.wait_ready()
        said = [record.getMessage() for record in caplog.records]
        await handle.close()
        return said

    with caplog.at_level("INFO"):
        said = asyncio.run(run())
    runs = warm and (compiles or mx.default_device() != mx.cpu)
    begun = "Running 1 shapes of a first batch; no forward of them begins after 30 s (--warm off runs none)."
    assert (begun in said) == runs
    assert any(line.startswith("Ran 1 of 1 shapes in ") for line in said) == runs


def test_usual_shapes_come_first_and_every_shape_fits() -> None:
    found = shapes(1024, 32768, 10**6)
    assert found[0] == (256, 416) and {(512, 416), (256, 288), (128, 416), (1024, 416), (1, 160)} <= set(found)
    assert all(rows * columns <= 10**6 for rows, columns in found) and (1024, 1056) not in found
    halved = [rows & (rows - 1) == 0 for rows, _ in found]
    assert halved == sorted(halved, reverse=True), "batches shrink by halves"
    assert max(columns for _, columns in found) == few_columns(1025)
    assert len(set(found)) == len(found)
    assert {rows for rows, _ in shapes(100, 64, 10**6)} == {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100}
    assert shapes(8, 64, 10) == []


def test_widths_are_those_that_rows_come_to() -> None:
    sizes = sorted({few_columns(count) for count in range(1, 2000)})
    for smaller, columns in zip([1, *sizes], sizes, strict=False):
        found = widths(columns, every=True)
        assert {min(columns - 1, few_widths(needed)) for needed in range(smaller, columns)} == set(found)
    assert widths(416, every=False) == [415]


def test_chunks_are_what_a_turn_takes_or_one_alone() -> None:
    assert chunks(32, 415, 8192) == [(1, 64), (1, 128), (1, 256), (32, 64), (32, 128), (32, 256)]
    assert chunks(256, 1055, 2048) == sorted(
        {*((1, 64 << n) for n in range(5)), (32, 64), (16, 128), (8, 256), (4, 512), (2, 1024)}
    )
    assert chunks(4, 159, 32) == []


def test_few_columns_occur_and_a_power_of_two_takes_no_half_more() -> None:
    for count in range(1, 20_000):
        found = few_columns(count)
        assert found >= count and few_columns(found) == found and found % 32 == 0
    assert len({few_columns(count) for count in range(1, 8194)}) == 13
    assert few_columns(8192 + 1) == 8192 + 32
