"""Milliseconds of the sampler alone, by what the rows ask for, beside an argmax over the same logits.

`python -m benchmarks.studies.sampler [--rows 32] [--vocabulary 16384] [--rounds 40] [--spread 0.6] [--json]`. All kinds
take turns in one process; what is printed are medians of elapsed time and, for a busy machine, of the CPU's. `--spread`
is the standard deviation of the logits: 0.6 is a random model, nearly flat; 3 is like a trained one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    import mlx.core as mx


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.sampler", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="rows of the batch")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="logits of a row")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each kind, taken in turns")
    parser.add_argument("--spread", type=float, default=0.6, help="standard deviation of the logits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    for name in ("rows", "vocabulary", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    print(load_fast_blas(), file=sys.stderr)  # Before anything imports mlx.
    times = measure(kinds(options.rows, options.vocabulary, options.spread), options.rounds)
    report = {
        name: {
            "ms": round(statistics.median(t for t, _ in found), 3),
            "cpu_ms": round(statistics.median(c for _, c in found), 3),
        }
        for name, found in times.items()
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{options.rows} rows, {options.vocabulary} logits each")
    for name, found in report.items():
        print(f"{name:<28}{found['ms']:>9.2f} ms{found['cpu_ms']:>9.2f} ms of CPU")
    return 0


def kinds(rows: int, vocabulary: int, spread: float) -> dict[str, Callable[[], list[mx.array]]]:
    """What is measured: calls that return the arrays to evaluate."""
    import mlx.core as mx

    from rollout_server.engine.sampling.sampler import prepare, sample, uniforms
    from rollout_server.rollout import SamplingParams

    logits = mx.random.normal((rows, vocabulary)) * spread
    draws, seen = mx.array(uniforms(range(rows), [0] * rows)), mx.zeros((rows, vocabulary), dtype=mx.int32)
    mx.eval(logits, draws, seen)

    def share(row: int) -> float:
        return 0.9 + 0.1 * row / max(1, rows - 1)

    mixed: list[Callable[[int], Mapping[str, Any]]] = [
        lambda row: {"top_p": share(row)},
        lambda row: {"top_k": 50},
        lambda row: {"min_p": 0.05},
        lambda row: {"top_p": 0.95, "top_k": 20, "min_p": 0.01},
    ]

    def call(of: Callable[[int], Mapping[str, Any]], **wants: Any) -> Callable[[], list[mx.array]]:
        params = [SamplingParams(max_tokens=1, **of(row)) for row in range(rows)]
        arrays = prepare(params, vocabulary, **({"entropy": False, "top_logprobs": 0} | wants))
        return lambda: sample(logits, arrays, draws, seen=seen).arrays()

    return {
        "argmax": lambda: [mx.argmax(logits, axis=-1)],
        "temperature 1": call(lambda row: {}),
        "temperature 0.7": call(lambda row: {"temperature": 0.7}),
        "top-p by row": call(lambda row: {"top_p": share(row)}),
        "top-k 50": call(lambda row: {"top_k": 50}),
        "min-p": call(lambda row: {"min_p": 0.05}),
        "top-p, top-k, min-p mixed": call(lambda row: mixed[row % 4](row)),
        "penalties": call(lambda row: {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}),
        "logit_bias": call(lambda row: {"logit_bias": ((row % vocabulary, 1.0),)}),
        "entropy, top_logprobs 5": call(lambda row: {}, entropy=True, top_logprobs=5),
    }


def measure(calls: Mapping[str, Callable[[], list[mx.array]]], rounds: int) -> dict[str, list[tuple[float, float]]]:
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
