"""The kernel that filters rows on a GPU: its algorithm in numpy, its own text compiled for this machine, and the kernel
itself where there is a GPU, against its definition to the last bit and against the searches of `filters`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.kernels.text import own_device
from rollout_server.engine.sampling.filter_kernel import (
    FilterKernel,
    KernelFilters,
    build_kernel,
    least_kept,
    limits_of,
)
from rollout_server.engine.sampling.filters import ONE_BITS, bisect, descend, prepare_filters
from rollout_server.engine.sampling.kernel_choice import kernel_fault, trial_rows
from rollout_server.engine.sampling.numerics import block_sums
from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
from rollout_server.engine.sampling.sampler_check import check_sampler
from rollout_server.rollout import SamplingParams
from tests.engine.sampling.test_filters import MIXED, ROUNDING, limits, logits_of
from tests.laws.grids import corners, some_long
from tests.support.numbers.filter_passes import FilterPasses
from tests.support.numbers.host_kernels import TEXTS, host_compiler

KINDS = ["numpy", "CUDA's text", "Metal's text", "the GPU"]


@pytest.fixture(scope="session")
def kernel_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FilterKernel]:
    """Kernels by what runs them; compiled once."""

    def kernel(kind: str, threads: int = 8) -> FilterKernel:
        if kind == "the GPU":
            device = own_device()
            if device is None:
                pytest.skip("There is no GPU.")
            return FilterKernel(build_kernel(device))
        if kind == "numpy":
            return FilterKernel(FilterPasses(), threads)
        return FilterKernel(build_kernel(TEXTS[kind], host_compiler(tmp_path_factory)), threads)

    return kernel


def weights_of(logits: NDArray[Any]) -> NDArray[np.float32]:
    return np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)


def random_rows(vocabulary: int, count: int, seed: int) -> tuple[NDArray[np.float32], list[SamplingParams]]:
    """Weights of every kind, and any setting that can be asked for."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((count, vocabulary)) * random.choice([0.01, 0.6, 3, 10, 60], (count, 1))
    coarse = random.random(count) < 0.3
    logits[coarse] = np.round(logits[coarse])
    logits[random.random((count, vocabulary)) < random.choice([0, 0, 0.5, 0.95], (count, 1))] = -np.inf
    logits[np.arange(count), random.integers(0, vocabulary, count)] = 1.0
    params = [
        SamplingParams(
            max_tokens=1,
            top_p=float(random.choice([1, 0.5, 0.9, 1e-9, 1 - 1e-7, 1 - 2**-24, 0.01 + 0.98 * random.random()])),
            top_k=int(random.choice([0, 0, 1, 5, vocabulary // 2, vocabulary - 1, vocabulary, vocabulary + 5])),
            min_p=float(random.choice([0, -0.0, 1e-30, 1e-3, 1])),
        )
        for _ in range(count)
    ]
    return weights_of(logits), params


def filtered(
    kernel: FilterKernel, weights: NDArray[np.float32], params: Sequence[SamplingParams]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What is left of the weights, and the least that stays of each row."""
    kept, least = kernel(mx.array(weights), mx.array(limits_of(params, weights.shape[1])))
    return np.array(kept), np.array(least)[:, 0]


@pytest.mark.parametrize(("kind", "vocabulary"), corners(KINDS, [301, 4096]))
def test_every_trial_at_load_comes_out_to_the_last_bit(
    kind: str, vocabulary: int, kernel_of: Callable[..., FilterKernel]
) -> None:
    kernel = kernel_of(kind)
    assert kernel_fault(kernel, trial_rows(vocabulary)) is None
    assert check_sampler(vocabulary, mx.float32, 12, kernel) is None


@pytest.mark.parametrize(("kind", "size"), corners(KINDS, [(12, 1500), (301, 300), (4096, 60)]))
def test_any_rows_keep_what_the_definition_says(
    kind: str, size: tuple[int, int], kernel_of: Callable[..., FilterKernel]
) -> None:
    vocabulary, count = size
    # Threads of this machine take their time to meet.
    weights, params = random_rows(vocabulary, count // 5 if "text" in kind else count, seed=vocabulary)
    kept, least = filtered(kernel_of(kind), weights, params)
    expected = np.array(
        [least_kept(row, each) for row, each in zip(weights, limits_of(params, vocabulary), strict=True)]
    )
    assert np.array_equal(least.view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(kept, weights * (weights >= expected[:, None]))


@pytest.mark.parametrize("kind", some_long(["numpy", "CUDA's text", "the GPU"], "numpy", "the GPU"))
def test_a_large_vocabulary(kind: str, kernel_of: Callable[..., FilterKernel]) -> None:
    assert kernel_fault(kernel_of(kind), trial_rows(151_936)) is None


def test_rows_with_a_filter_that_the_kernel_has_not_are_filtered_without_it() -> None:
    kernel = FilterKernel(FilterPasses(), 8, frozenset({"top_k", "top_p"}))
    greedy, plain = SamplingParams(max_tokens=1, temperature=0, min_p=0.1), SamplingParams(max_tokens=1, top_k=5)
    for rows, takes in (([plain, None, greedy], True), ([plain, SamplingParams(max_tokens=1, min_p=0.1)], False)):
        arrays = prepare(rows, 301, entropy=False, top_logprobs=0, kernel=kernel)
        assert isinstance(arrays.filters, KernelFilters) is takes and arrays.filters is not None


@pytest.mark.parametrize(("kind", "threads"), corners(list(TEXTS), [3, 64]))
def test_any_number_of_threads_finds_the_same(kind: str, threads: int, kernel_of: Callable[..., FilterKernel]) -> None:
    weights, params = random_rows(301, 20, seed=3)
    for one, other in zip(
        filtered(kernel_of(kind), weights, params), filtered(kernel_of(kind, threads), weights, params), strict=True
    ):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("spread", ["flat", "random model", "wide", "peaked", "equal", "few values", "masked"])
def test_the_definition_is_that_of_the_filters(spread: str) -> None:
    """Within the rounding of a sum in float32, which is what the searches of `filters` are held to."""
    for vocabulary in (301, 16_384):
        weights = weights_of(logits_of(spread, vocabulary, len(MIXED)).astype(np.float64))
        params = [SamplingParams(max_tokens=1, **setting) for setting in MIXED]
        for row, (param, limit) in enumerate(zip(params, limits_of(params, vocabulary), strict=True)):
            stays = weights[row] >= least_kept(weights[row], limit)
            if not param.filtered:
                assert stays.all()
                continue
            wide = weights[row].astype(np.float64)
            assert (stays >= limits(wide, param, -ROUNDING)).all() and (stays <= limits(wide, param, ROUNDING)).all()


@pytest.mark.parametrize("size", [2, 300, 513, 4096])
def test_where_no_sum_is_rounded_it_finds_what_both_searches_find(size: int) -> None:
    weights = np.random.default_rng(size).exponential(size=(6, size))
    weights = (np.round(weights / weights.max(axis=1, keepdims=True) * 1024) / 1024).astype(np.float32)
    weights[1] = np.round(weights[1], 0)
    given, total = mx.array(weights), weights.sum(axis=1, keepdims=True)
    for share in (2**-20, 0.25, 0.5, 0.96875):
        goal = mx.array(total * np.float32(share))
        (limit,) = limits_of([SamplingParams(max_tokens=1, top_p=share)], size)
        least = np.array([[least_kept(row, limit)] for row in weights])
        for search in (descend, bisect):
            assert np.array_equal(np.array(search(given, goal, by_rank=False)), least)
    for rank in {1, size // 2, size - 1}:
        (limit,) = limits_of([SamplingParams(max_tokens=1, top_k=rank)], size)
        least = np.array([[least_kept(row, limit)] for row in weights])
        for search in (descend, bisect):
            assert np.array_equal(np.array(search(given, mx.full((6, 1), float(rank)), by_rank=True)), least)


def test_a_row_of_nan_is_left_as_the_other_search_leaves_it() -> None:
    """What is drawn of it and how it is told must not depend on the path."""
    weights = np.full((1, 300), np.nan, dtype=np.float32)
    for setting in ({"top_p": 0.9}, {"top_k": 5}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}):
        params = [SamplingParams(max_tokens=1, **setting)]
        filters = prepare_filters(params, 300, narrow=False)
        assert filters is not None
        total = block_sums(mx.array(weights)).sum(axis=-1, keepdims=True)
        goal = total if "top_k" not in setting else mx.array([[5.0]])
        assert bisect(mx.array(weights), goal, by_rank="top_k" in setting).item() == 1.0
        assert least_kept(weights[0], limits_of(params, 300)[0]).view(np.uint32) == ONE_BITS


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_sampled_as_without_the_kernel(kind: str, kernel_of: Callable[..., FilterKernel]) -> None:
    """Bit for bit: ids, log-probabilities, kept mass, entropy and the best tokens, of rows that filter by rank and by
    min-p, where no sum decides, and of those that do not filter; places without a row among them."""
    settings: list[dict[str, Any] | None] = [
        {},
        {"top_k": 50},
        None,
        {"min_p": 0.05, "temperature": 0.7},
        {"temperature": 0.0},
        {"top_k": 3, "min_p": 0.3},
        {"logit_bias": ((5, 3.0),), "top_k": 2000},
    ]
    params = [None if each is None else SamplingParams(max_tokens=1, **each) for each in settings]
    logits = mx.array(logits_of("wide", 4096, len(params), seed=2)).astype(mx.bfloat16)
    draws = mx.array(uniforms(range(len(params)), [3] * len(params)))
    plain, ours = (
        sample(logits, prepare(params, 4096, entropy=True, top_logprobs=3, kernel=kernel), draws)
        for kernel in (None, kernel_of(kind))
    )
    for one, other in zip(plain.arrays(), ours.arrays(), strict=True):
        assert np.array_equal(np.array(one), np.array(other), equal_nan=True)


def test_rows_that_do_not_filter_need_no_kernel() -> None:
    assert FilterKernel(FilterPasses()).prepare([None, SamplingParams(max_tokens=1)], 300) is None
