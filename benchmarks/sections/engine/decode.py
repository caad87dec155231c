"""Section `decode`: the engine at 32 rows against the bare forward pass and mlx-lm's BatchGenerator."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.engine import EXTRAS, MIXED, PENALTIES, TOP_P
from benchmarks.measure import Load
from benchmarks.record import Measured, Ratio, Scale, Section, ratio
from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    from benchmarks.measure import Contender, Load, Result


ROWS, PROMPT_TOKENS = 32, 100
WHAT = (
    "Every contender decodes the same 32 prompts of 100 tokens in one process, in turns; prefill is outside. `bare` "
    "is mlx-lm's `BatchKVCache`, the forward pass and an argmax, one step dispatched ahead; `no mask` its plain "
    "`KVCache`, which serves rows of one length alone; ratios are to the fastest of the three in each round. The "
    "engine samples at temperature 1 and returns `logprobs`, `sampling_logprobs` and `log_kept_mass`. Mixed filters: "
    "a quarter of the rows each with its own top-p from 0.9 to 1.0, top-k 50, min-p 0.05, and all three. "
    "`BatchGenerator` runs without reading its log-probabilities."
)
QUIET_SPREAD = 1.25
LEAST_SHARE = 0.1


def section(scale: Scale) -> Section:
    load = Load(ROWS, PROMPT_TOKENS, 96 if scale.full else 32)
    report = compare(load, scale.rounds, top_p=True, kinds=True)
    found = {name: Measured(name, "tok/s", tuple(entry["rounds"])) for name, entry in report["results"].items()}
    loops = [one.rounds for name, one in found.items() if name.startswith("bare")]
    bare = Measured("bare", "tok/s", tuple(map(max, zip(*loops, strict=True))))
    return Section(
        "decode",
        "Decode at 32 rows",
        WHAT,
        tuple(found.values()),
        tuple(ratios(found, bare)),
        facts=facts(report),
        warnings=tuple(report["warnings"]),
    )


def ratios(found: dict[str, Measured], bare: Measured) -> list[Ratio]:
    plain, peer = found["engine"], found["BatchGenerator"]
    by_row = found["BatchGenerator, top-p by row"]
    return [
        ratio("engine with log-probabilities / bare forward + argmax", plain, bare, 0.85),
        ratio("the same, filters mixed by row / bare", found[f"engine, {MIXED}"], bare, 0.75),
        ratio("the same, penalties / bare", found[f"engine, {PENALTIES}"], bare),
        ratio("the same, entropy and 5 alternatives / bare", found[f"engine, {EXTRAS}"], bare),
        ratio("BatchGenerator / bare", peer, bare),
        ratio("engine / BatchGenerator", plain, peer),
        ratio("engine / BatchGenerator, both top-p by row", found[f"engine, {TOP_P}"], by_row),
    ]


def facts(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "parameters": report["parameters"],
        "rows": report["rows"],
        "prompt tokens": report["prompt_tokens"],
        "steps": report["steps"],
        "doctor's GFLOP/s": report["doctor_gflops"],
        "GFLOP/s at this batch": report["gflops_at_this_batch"],
        "GFLOP/s of the bare loop's products": report["bare_gflops"],
        "device": report["device"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sections.engine.decode", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contender, taken in turns")
    parser.add_argument("--rows", type=int, default=32, help="sequences that decode together")
    parser.add_argument("--prompt-tokens", type=int, default=100, help="length of every prompt")
    parser.add_argument("--steps", type=int, default=48, help="timed decode steps")
    parser.add_argument("--top-p", action="store_true", help="also measure a different top-p for every row")
    parser.add_argument(
        "--kinds", action="store_true", help="also measure mixed filters, penalties and what is on request"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, progress on stderr")
    options = parser.parse_args()
    for name in ("rounds", "rows", "prompt_tokens", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    blas = load_fast_blas()  # Before anything imports mlx, hence the imports inside the functions below.
    print(blas, file=sys.stderr)

    from benchmarks.measure import Load

    load = Load(options.rows, options.prompt_tokens, options.steps)
    report = compare(load, options.rounds, top_p=options.top_p, kinds=options.kinds)
    report["blas"] = blas.name
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


def compare(load: Load, rounds: int, *, top_p: bool, kinds: bool = False) -> dict[str, Any]:
    """Measure everybody and return machine, model, tok/s of each round and ratios to the faster bare loop."""
    import mlx.core as mx
    import mlx_lm
    from mlx.utils import tree_flatten

    from benchmarks.contenders.bare import BareLoop, UnmaskedLoop
    from benchmarks.contenders.engine import EXTRAS, MIXED, PENALTIES, TOP_P, EngineDecode
    from benchmarks.contenders.mlx_lm import BatchGeneratorDecode
    from benchmarks.measure import interleave, matmul_gflops
    from benchmarks.model import random_prompts, write_model
    from rollout_server.machine.doctor import measure_gflops

    variants = (False, True) if top_p else (False,)
    ours = ["", *([TOP_P] if top_p else []), *([MIXED, PENALTIES, EXTRAS] if kinds else [])]
    prompts = random_prompts(load.rows, load.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as open_engines:
        directory = write_model(Path(folder) / "qwen3-33m")
        model, _ = mlx_lm.load(str(directory))
        contenders: list[Contender] = [
            BareLoop(model, prompts, load, compiled=False),
            BareLoop(model, prompts, load, compiled=True),
            UnmaskedLoop(model, prompts, load),
            *(BatchGeneratorDecode(model, prompts, load, top_p=variant) for variant in variants),
            *(open_engines.enter_context(EngineDecode(directory, prompts, load, kind=kind)) for kind in ours),
        ]
        results = interleave(contenders, rounds, lambda line: print(line, file=sys.stderr, flush=True))
    loops = [result for result in results if result.name.startswith("bare")]
    bare = max(result.median for result in loops)
    spread = min(max(result.rates) / min(result.rates) for result in loops)
    parameters = sum(leaf.size for _, leaf in tree_flatten(model.parameters()))
    doctor = measure_gflops()
    return {
        "device": str(mx.default_device()),
        "doctor_gflops": round(doctor, 1),
        "gflops_at_this_batch": round(matmul_gflops(load.rows), 1),
        "bare_gflops": round(2 * parameters * bare / 1e9, 1),
        "parameters": parameters,
        "rows": load.rows,
        "prompt_tokens": load.prompt_tokens,
        "steps": load.steps,
        "rounds": rounds,
        "results": {result.name: describe(result, bare) for result in results},
        "warnings": list(doubts(spread, 2 * parameters * bare / 1e9 / doctor)),
    }


def doubts(spread: float, share: float) -> Iterator[str]:
    """Reasons not to quote this run. `share`: of the doctor's GFLOP/s in the bare loop, 0.16 on a quiet CPU."""
    if spread > QUIET_SPREAD:
        yield f"The bare loop's rounds differ by a factor of {spread:.2f}: the machine was busy, measure again."
    if share < LEAST_SHARE:
        yield f"The bare loop reaches only {share:.2f} of the doctor's GFLOP/s: the denominator is too slow to count."


def describe(result: Result, bare: float) -> dict[str, Any]:
    return {
        "tokens_per_s": round(result.median, 1),
        "ratio_to_bare": round(result.median / bare, 3),
        "rounds": [round(rate, 1) for rate in result.rates],
    }


def table(report: dict[str, Any]) -> str:
    head = (
        f"{report['parameters'] / 1e6:.1f}M parameters, float32, {report['rows']} rows, prompts of "
        f"{report['prompt_tokens']} tokens, {report['steps']} steps, medians of {report['rounds']} rounds\n"
        f"{report['device']}, {report['blas']}: {report['doctor_gflops']} GFLOP/s in a square product (doctor), "
        f"{report['gflops_at_this_batch']} with {report['rows']} rows; the bare loop's products alone come to "
        f"{report['bare_gflops']}\n"
    )
    lines = [
        f"{name:<30} {result['tokens_per_s']:>8.1f} tok/s  {result['ratio_to_bare']:>6.3f} of bare"
        for name, result in report["results"].items()
    ]
    return "\n".join([head, *lines, *report["warnings"]])


if __name__ == "__main__":
    sys.exit(main())
