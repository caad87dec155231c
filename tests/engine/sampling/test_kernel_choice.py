"""A kernel filters rows only where it was found exact and faster; without one, the server starts and samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from adapters.kernels.text import Device, Launch
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling.filter_kernel import MOST_TOKENS, FilterKernel, build_kernel
from rollout_server.engine.sampling.kernel_choice import choose_filter_kernel, proven
from rollout_server.engine.sampling.numerics import on_cpu
from tests.engine.scoring.test_replay import mixed_rows
from tests.support.engine.driver import Driver
from tests.support.numbers.filter_passes import FilterPasses

VOCABULARY = 300


def clock_of(ours: float, theirs: float) -> Callable[[], float]:
    """By which the kernel takes `ours` seconds and what follows it `theirs`."""
    begun = count()
    now = 0.0

    def clock() -> float:
        nonlocal now
        number = next(begun)
        if number % 2:
            now += ours if number < 10 else theirs
        return now

    return clock


def try_kernel(launch: Launch, *, ours: float = 1.0, theirs: float = 2.0) -> FilterKernel | None:
    return proven(lambda: launch, VOCABULARY, mx.float32, clock_of(ours, theirs))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    caplog.set_level(logging.INFO, logger="rollout_server.engine.sampling")
    yield lambda: caplog.messages[-1]


def test_a_kernel_that_is_exact_and_faster_is_taken(said: Callable[[], str]) -> None:
    assert try_kernel(FilterPasses()) is not None
    assert said() == (
        "Rows are filtered by a kernel: the kernel takes 1000.00 ms for 35 rows of 300 tokens, MLX's own operations "
        "2000.00."
    )


def test_a_slower_one_is_not(said: Callable[[], str]) -> None:
    assert try_kernel(FilterPasses(), ours=2.0, theirs=1.0) is None
    assert said().startswith("Rows are filtered by MLX's own operations: the kernel takes 2000.00 ms")


def off_by_one_bit(**call: Any) -> list[mx.array]:
    kept, least = FilterPasses()(**call)
    return [kept, mx.where(least > 0, least + 1, least)]


def other_rows(**call: Any) -> list[mx.array]:
    kept, least = FilterPasses()(**call)
    return [mx.roll(kept, 1, axis=0), least]


def not_compiled(**call: Any) -> Sequence[mx.array]:
    raise RuntimeError("error: identifier\n  is undefined" + " and so on" * 100)


@pytest.mark.parametrize(
    "launch, why",
    [
        (off_by_one_bit, "with the kernel for it, row 0"),
        (other_rows, "is left with other weights than the"),
        (not_compiled, "does not run here (error: identifier is undefined and so on"),
    ],
)
def test_one_that_is_wrong_or_cannot_be_compiled_is_not_used(launch: Launch, why: str, said: Callable[[], str]) -> None:
    assert try_kernel(launch) is None
    assert said().startswith("Rows are filtered by MLX's own operations: ") and why in said() and len(said()) < 500


@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_where_there_is_no_gpu_a_kernel_ends_no_start(device: Device, said: Callable[[], str]) -> None:
    if not on_cpu():
        pytest.skip("There is a GPU.")
    assert choose_filter_kernel(VOCABULARY, mx.float32) is None
    assert proven(lambda: build_kernel(device), VOCABULARY, mx.float32) is None
    assert "does not run here" in said() and "back-end" in said()


def test_a_vocabulary_whose_masses_would_not_fit_is_left_to_mlx(said: Callable[[], str]) -> None:
    assert proven(FilterPasses, MOST_TOKENS + 1, mx.float32) is None
    assert f"takes {MOST_TOKENS} tokens at most" in said()


@pytest.mark.skipif(on_cpu(), reason="needs a GPU")
def test_this_gpu_uses_it() -> None:
    assert choose_filter_kernel(151_936, mx.bfloat16) is not None


def test_rows_of_an_engine_with_a_kernel_are_those_of_one_without_and_are_drawn_again(
    qwen: Path, bare_model: Callable[[str], ResidentModel]
) -> None:
    plain, calls = bare_model("qwen3"), count()

    def counted(**call: Any) -> list[mx.array]:
        next(calls)
        return FilterPasses()(**call)

    driver = Driver.start(qwen, replace(plain, filter_kernel=FilterKernel(counted)), max_batch=32)
    rows = mixed_rows(driver)
    decoded = next(calls)
    assert decoded
    assert all(found.exact for found in driver.replay(rows))
    assert next(calls) > decoded + 1
    for row, other in zip(rows, mixed_rows(Driver.start(qwen, plain, max_batch=32)), strict=True):
        assert row.token_ids == other.token_ids
