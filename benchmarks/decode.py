"""Section `decode`: the engine at 32 rows against the bare forward pass and mlx-lm's BatchGenerator."""

from __future__ import annotations

from typing import Any

from benchmarks.engine import compare
from benchmarks.measure import Load
from benchmarks.ours import EXTRAS, MIXED, PENALTIES, TOP_P
from benchmarks.record import Measured, Ratio, Scale, Section, ratio

ROWS, PROMPT_TOKENS = 32, 100
WHAT = (
    "Every contender decodes the same 32 prompts of 100 tokens in one process, in turns; prefill is outside. `bare` "
    "is mlx-lm's `BatchKVCache`, the forward pass and an argmax, one step dispatched ahead; `no mask` its plain "
    "`KVCache`, which serves rows of one length alone; ratios are to the fastest of the three in each round. The "
    "engine samples at temperature 1 and returns `logprobs`, `sampling_logprobs` and `log_kept_mass`. Mixed filters: "
    "a quarter of the rows each with its own top-p from 0.9 to 1.0, top-k 50, min-p 0.05, and all three. "
    "`BatchGenerator` runs without reading its log-probabilities."
)


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
