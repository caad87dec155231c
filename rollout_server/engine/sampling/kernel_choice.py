"""Chooses whether this device filters by `filter_kernel`: only where the kernel is exact on it, and faster than MLX's
own operations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from adapters.kernels.text import Launch, own_device
from rollout_server.engine.sampling.filter_kernel import (
    MOST_TOKENS,
    FilterKernel,
    build_kernel,
    least_kept,
    limits_of,
)
from rollout_server.engine.sampling.filters import prepare_filters
from rollout_server.engine.sampling.numerics import block_sums, on_cpu
from rollout_server.engine.sampling.sampler_check import check_sampler
from rollout_server.rollout import SamplingParams

log = logging.getLogger("rollout_server.engine.sampling")
SAMPLED_ROWS = 12
ROUNDS = 5
SHOWN = 300
"""Characters of a compiler's error."""


def choose_filter_kernel(vocabulary: int, dtype: mx.Dtype) -> FilterKernel | None:
    """The kernel for this device and a model of this vocabulary whose logits have this dtype; None where MLX's own
    operations find what stays, as on a CPU. The log says which it is and why."""
    device = own_device()
    return None if device is None else proven(lambda: build_kernel(device), vocabulary, dtype)


def proven(
    build: Callable[[], Launch],
    vocabulary: int,
    dtype: mx.Dtype,
    clock: Callable[[], float] = time.perf_counter,
) -> FilterKernel | None:
    """The kernel, if all that it is asked here comes out right and sooner. A kernel that fails ends no start. `clock`
    is in seconds."""
    if vocabulary > MOST_TOKENS:
        log.info("Rows are filtered by MLX's own operations: the kernel takes %d tokens at most.", MOST_TOKENS)
        return None
    rows = trial_rows(vocabulary)
    try:
        kernel = FilterKernel(build())
        fault = kernel_fault(kernel, rows) or check_sampler(vocabulary, dtype, SAMPLED_ROWS, kernel)
        ours, theirs = seconds(kernel, rows, clock)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:SHOWN]
        log.warning("Rows are filtered by MLX's own operations: the kernel for it does not run here (%s).", reason)
        return None
    if fault is not None:
        log.warning("Rows are filtered by MLX's own operations: with the kernel for it, %s.", fault)
        return None
    faster = ours < theirs
    log.info(
        "Rows are filtered by %s: the kernel takes %.2f ms for %d rows of %d tokens, MLX's own operations %.2f.",
        "a kernel" if faster else "MLX's own operations", 1e3 * ours, len(rows.settings), vocabulary, 1e3 * theirs,
    )  # fmt: skip
    return kernel if faster else None


@dataclass(frozen=True, slots=True, eq=False)
class TrialRows:
    """What the kernel is tried on."""

    weights: np.ndarray
    """float32 [R, V]"""
    settings: list[SamplingParams]

    @property
    def vocabulary(self) -> int:
        return int(self.weights.shape[1])


def trial_rows(vocabulary: int) -> TrialRows:
    """Seven kinds of rows, each under five settings: flat ones, few tokens that matter, ties, zeros, one token, all
    equal, and NaN."""
    random = np.random.default_rng(5)
    logits = random.standard_normal((7, vocabulary))
    logits *= np.array([0.6, 4, 3, 3, 1, 0, 1])[:, None]
    logits[2] = np.round(logits[2])
    logits[3, random.random(vocabulary) < 0.7] = -np.inf
    logits[4] -= 200
    logits[4, vocabulary // 2] = 0.0
    weights = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
    weights[6] = np.nan
    every: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": min(50, vocabulary), "top_p": 0.8, "min_p": 1e-3},
        {"top_p": 1 - 1e-7, "min_p": 1e-6},
        {"top_k": max(1, vocabulary // 3)},
        {"top_k": vocabulary, "top_p": 1e-9},
    ]
    settings = [SamplingParams(max_tokens=1, **setting) for setting in every]
    return TrialRows(np.repeat(weights, len(settings), axis=0), settings * len(weights))


def kernel_fault(kernel: FilterKernel, rows: TrialRows) -> str | None:
    """Where the kernel finds another number than the definition, to the last bit, or keeps other weights than those;
    None if nowhere."""
    limits = limits_of(rows.settings, rows.vocabulary)
    kept, least = kernel(mx.array(rows.weights), mx.array(limits))
    mx.eval(kept, least)
    found, left = np.array(least)[:, 0], np.array(kept)
    for row, (weights, params) in enumerate(zip(rows.weights, rows.settings, strict=True)):
        expected = least_kept(weights, limits[row])
        if found[row].view(np.uint32) != expected.view(np.uint32):
            return f"row {row} ({params}) keeps what is at least {found[row]}, where numpy says {expected}"
        stays = weights >= expected
        if not np.array_equal(left[row], weights * stays, equal_nan=True):
            return f"row {row} ({params}) is left with other weights than the {int(stays.sum())} that stay"
    return None


def seconds(kernel: FilterKernel, rows: TrialRows, clock: Callable[[], float]) -> tuple[float, float]:
    """The least time that the kernel and MLX's own operations take over the same rows."""
    given = mx.array(rows.weights)
    total = block_sums(given).sum(axis=-1, keepdims=True)
    mx.eval(given, total)
    ours = kernel.prepare(rows.settings, rows.vocabulary)
    theirs = prepare_filters(rows.settings, rows.vocabulary, narrow=on_cpu())
    if ours is None or theirs is None:
        raise RuntimeError("Rows that are filtered were prepared as if they were not.")
    best = []
    for filters in (ours, theirs):
        taken = []
        for _ in range(ROUNDS):
            begin = clock()
            mx.eval(filters.keep(given, total))
            taken.append(clock() - begin)
        best.append(min(taken))
    return best[0], best[1]
