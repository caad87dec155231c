"""Section `growth`: tokens per second of one row, from one row to 256."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import mlx_lm

from benchmarks.contenders.bare import BareLoop
from benchmarks.contenders.engine import EngineDecode
from benchmarks.contenders.mlx_lm import BatchGeneratorDecode
from benchmarks.measure import Load, interleave
from benchmarks.model import random_prompts, write_model
from benchmarks.record import Curve, Measured, Scale, Section, ratio

SIZES, FEW_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 4, 16, 64, 256)
PROMPT_TOKENS = 32
X_LABEL = "rows in the batch"
WHAT = (
    "Decode as in the first section, prompts of 32 tokens, at growing batch sizes: tokens per second of the whole "
    "batch, divided by its rows in the chart's second half. Where a batch costs no more than one row, the second is "
    "flat."
)


def section(scale: Scale) -> Section:
    sizes, steps = (SIZES, 48) if scale.full else (FEW_SIZES, 12)
    found: dict[str, dict[int, tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder) / "qwen3-33m")
        model, _ = mlx_lm.load(str(directory))
        for rows in sizes:
            load = Load(rows, PROMPT_TOKENS, steps)
            prompts = random_prompts(rows, PROMPT_TOKENS)
            with EngineDecode(directory, prompts, load) as engine:
                bare = BareLoop(model, prompts, load, compiled=False)
                contenders = [engine, bare, BatchGeneratorDecode(model, prompts, load)]
                for result in interleave(contenders, scale.rounds):
                    found.setdefault(result.name, {})[rows] = result.rates
            line = ", ".join(f"{name} {statistics.median(rates[rows]):.0f}" for name, rates in found.items())
            print(f"  {rows} rows: {line} tok/s", file=sys.stderr, flush=True)
    measured = {
        (n, rows): Measured(f"{n}, {rows} rows", "tok/s", r) for n, by in found.items() for rows, r in by.items()
    }
    return Section(
        "growth",
        "Growth: from one row to 256",
        WHAT,
        tuple(measured.values()),
        tuple(ratio(f"engine / bare, {rows} rows", measured["engine", rows], measured["bare", rows]) for rows in sizes),
        curves(found),
        facts={"prompt tokens": PROMPT_TOKENS, "steps": steps},
    )


def curves(found: dict[str, dict[int, tuple[float, ...]]]) -> tuple[Curve, ...]:
    medians = {name: {rows: statistics.median(r) for rows, r in by.items()} for name, by in found.items()}
    whole = (Curve(name, X_LABEL, "tok/s", tuple(by.items())) for name, by in medians.items())
    each = (
        Curve(name, X_LABEL, "tok/s of one row", tuple((rows, rate / rows) for rows, rate in by.items()))
        for name, by in medians.items()
    )
    return (*whole, *each)
