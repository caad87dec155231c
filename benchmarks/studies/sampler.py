"""Milliseconds of the sampler alone, by what the rows ask for, beside an argmax over the same logits.

    python -m benchmarks.studies.sampler [--rows 32 256] [--vocabulary 151936] [--rounds 40] [--spread 0.6] [--json]

All kinds take turns in one process; what is printed are medians of elapsed time and, for a busy machine, of the CPU's.
`--spread` is the standard deviation of the logits: 0.6 is a random model, nearly flat; 3 is like a trained one. On a
GPU logits are bfloat16, kinds that filter are measured with the kernel and without it, pieces of the sampler by
themselves, and what the kernel keeps is compared with what the search without it keeps.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    import mlx.core as mx

    from rollout_server.engine.sampling.filter_kernel import FilterKernel

THREADS = (256, 512, 1024)
"""Threads of a row, with which the kernel is measured."""
Call = Callable[[], "list[mx.array]"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.sampler", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", help="rows of the batch; 32 on a CPU, 32 256 1024 on a GPU")
    parser.add_argument("--vocabulary", type=int, help="logits of a row; 16384 on a CPU, 151936 on a GPU")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each kind, taken in turns")
    parser.add_argument("--spread", type=float, default=0.6, help="standard deviation of the logits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    print(load_fast_blas(), file=sys.stderr)  # Before anything imports mlx.
    import mlx.core as mx

    from rollout_server.engine.sampling.kernel_choice import choose_filter_kernel
    from rollout_server.engine.sampling.numerics import on_cpu

    every, vocabulary = options.rows or ([32] if on_cpu() else [32, 256, 1024]), options.vocabulary
    vocabulary = vocabulary or (16_384 if on_cpu() else 151_936)
    for name, value in (("rows", min(every)), ("vocabulary", vocabulary), ("rounds", options.rounds)):
        if value < 1:
            parser.error(f"--{name} must be at least 1")
    kernel = choose_filter_kernel(vocabulary, mx.float32 if on_cpu() else mx.bfloat16)
    found = [report_on(rows, vocabulary, options.spread, options.rounds, kernel) for rows in every]
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for each in found:
        print(f"\n{each['rows']} rows, {each['vocabulary']} logits each")
        for name, times in each["kinds"].items():
            print(f"{name:<44}{times['ms']:>9.3f} ms{times['cpu_ms']:>9.3f} ms of CPU")
        for name, value in each["agreement"].items():
            print(f"{name:<44}{value:>9g}")
    return 0


def report_on(rows: int, vocabulary: int, spread: float, rounds: int, kernel: FilterKernel | None) -> dict[str, Any]:
    import mlx.core as mx

    logits = logits_of(rows, vocabulary, spread)
    calls = kinds(logits, kernel)
    agreement: dict[str, float] = {}
    if kernel is not None:
        calls |= pieces(logits, kernel)
        agreement = agreement_on(logits, kernel)
    times = measure(calls, rounds)
    mx.clear_cache()
    medians = {
        name: {
            "ms": round(statistics.median(t for t, _ in found), 4),
            "cpu_ms": round(statistics.median(c for _, c in found), 4),
        }
        for name, found in times.items()
    }
    return {"rows": rows, "vocabulary": vocabulary, "spread": spread, "kinds": medians, "agreement": agreement}


def logits_of(rows: int, vocabulary: int, spread: float) -> mx.array:
    """As the model of such a device gives them."""
    import mlx.core as mx

    from rollout_server.engine.sampling.numerics import on_cpu

    made = mx.random.normal((rows, vocabulary), key=mx.random.key(0)) * spread
    logits = made if on_cpu() else made.astype(mx.bfloat16)
    mx.eval(logits)
    return logits


def share(row: int, rows: int) -> float:
    """A top_p of its own for each row."""
    return 0.9 + 0.1 * row / max(1, rows)


def kinds(logits: mx.array, kernel: FilterKernel | None) -> dict[str, Call]:
    """What is measured: calls that return the arrays to evaluate."""
    import mlx.core as mx

    from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
    from rollout_server.rollout import SamplingParams

    rows, vocabulary = logits.shape
    draws, seen = mx.array(uniforms(range(rows), [0] * rows)), mx.zeros((rows, vocabulary), dtype=mx.int32)
    mx.eval(draws, seen)
    mixed: list[Callable[[int], Mapping[str, Any]]] = [
        lambda row: {"top_p": share(row, rows)},
        lambda row: {"top_k": 50},
        lambda row: {"min_p": 0.05},
        lambda row: {"top_p": 0.95, "top_k": 20, "min_p": 0.01},
    ]

    def call(of: Callable[[int], Mapping[str, Any]], by: FilterKernel | None = None, **wants: Any) -> Call:
        params = [SamplingParams(max_tokens=1, **of(row)) for row in range(rows)]
        arrays = prepare(params, vocabulary, **({"entropy": False, "top_logprobs": 0, "kernel": by} | wants))
        return lambda: sample(logits, arrays, draws, seen=seen).arrays()

    filters: dict[str, Callable[[int], Mapping[str, Any]]] = {
        "top-p by row": lambda row: {"top_p": share(row, rows)},
        "top-p by row, temperature 0.7": lambda row: {"top_p": share(row, rows), "temperature": 0.7},
        "top-k 50": lambda row: {"top_k": 50},
        "min-p": lambda row: {"min_p": 0.05},
        "top-p, top-k, min-p mixed": lambda row: mixed[row % 4](row),
    }
    found = {
        "argmax": lambda: [mx.argmax(logits, axis=-1)],
        "temperature 1": call(lambda row: {}),
        "temperature 0.7": call(lambda row: {"temperature": 0.7}),
        "penalties": call(lambda row: {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}),
        "logit_bias": call(lambda row: {"logit_bias": ((row % vocabulary, 1.0),)}),
        "entropy, top_logprobs 5": call(lambda row: {}, entropy=True, top_logprobs=5),
    }
    for name, of in filters.items():
        found[name] = call(of, kernel)
        if kernel is not None:
            found[f"{name}, without the kernel"] = call(of)
    return found


def pieces(logits: mx.array, kernel: FilterKernel) -> dict[str, Call]:
    """What a filtered step on a GPU is made of."""
    import mlx.core as mx

    from rollout_server.engine.sampling.filter_kernel import FilterKernel, limits_of
    from rollout_server.engine.sampling.numerics import exponential, exponentials_of, peak_of, pyramid
    from rollout_server.rollout import SamplingParams

    rows, vocabulary = logits.shape
    peak = peak_of(logits).astype(mx.float32)
    weights = exponentials_of(logits, peak)
    limits = mx.array(
        limits_of([SamplingParams(max_tokens=1, top_p=share(row, rows)) for row in range(rows)], vocabulary)
    )
    mx.eval(peak, weights, limits)

    def filtered(threads: int) -> Call:
        other = FilterKernel(kernel.launch, threads)
        return lambda: list(other(weights, limits))

    return {
        "piece: peak": lambda: [peak_of(logits)],
        "piece: exponentials": lambda: [exponentials_of(logits, peak)],
        "piece: exponentials, part by part": lambda: [exponential(logits.astype(mx.float32) - peak)],
        "piece: pyramid": lambda: pyramid(weights),
        "piece: one pass (copy)": lambda: [weights + 1],
    } | {f"piece: top-p by the kernel, {threads} threads": filtered(threads) for threads in THREADS}


def agreement_on(logits: mx.array, kernel: FilterKernel) -> dict[str, float]:
    """What the kernel keeps, beside what the search without it keeps, of the same weights."""
    import mlx.core as mx

    from rollout_server.engine.sampling.filters import prepare_filters
    from rollout_server.engine.sampling.numerics import block_sums, exponential, exponentials_of, peak_of
    from rollout_server.rollout import SamplingParams

    rows, vocabulary = logits.shape
    peak = peak_of(logits).astype(mx.float32)
    weights = exponentials_of(logits, peak)
    total = block_sums(weights).sum(axis=-1, keepdims=True)
    found = {}
    for name, of in {
        "top-p": lambda row: {"top_p": share(row, rows)},
        "top-k": lambda row: {"top_k": 1 + row % 100},
        "all three": lambda row: {"top_k": 1000, "top_p": share(row, rows), "min_p": 0.01},
    }.items():
        params = [SamplingParams(max_tokens=1, **of(row)) for row in range(rows)]
        ours, theirs = kernel.prepare(params, vocabulary), prepare_filters(params, vocabulary, narrow=False)
        if ours is None or theirs is None:
            raise RuntimeError("Rows that are filtered were prepared as if they were not.")
        one, other = ours.keep(weights, total), theirs.keep(weights, total)
        found[f"rows that keep other tokens by {name}"] = int(mx.any(one != other, axis=-1).sum().item())
        apart = mx.abs(one - other).sum(axis=-1, keepdims=True) / total
        found[f"largest share that they differ by, {name}"] = float(mx.max(apart).item())
    parts = exponential(logits.astype(mx.float32) - peak)
    found["exponentials that differ from their parts'"] = int(mx.sum(weights != parts).item())
    return found


def measure(calls: Mapping[str, Call], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds that passed and that this process computed, for each call; one more round warms up."""
    import mlx.core as mx

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin, computed = time.perf_counter(), time.process_time()
            mx.eval(call())
            if number:
                times[name].append((1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - computed)))
    return times


if __name__ == "__main__":
    sys.exit(main())
