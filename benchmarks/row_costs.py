"""Section `rows`: what rows cost each other, measured by `benchmarks.rows`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.models import write_model
from benchmarks.record import Measured, Ratio, Scale, Section
from benchmarks.rows import group_prefill, join_finish, long_row
from tests.engine.driver import Driver

SAMPLES = 16
WHAT = (
    "The engine, driven turn by turn in this process; each pair is measured in turns, the ratio is of medians. The "
    "long row has a prompt of 4,096 tokens among 31 of 128. Joining and finishing: what a row that comes and goes at "
    "once adds to three turns of 24 rows of 128 and of 512 columns. A group's prefill runs from its submission until "
    "all its rows are seated; the prompt has 1,024 tokens."
)


def section(scale: Scale) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        driver = Driver.start(write_model(Path(folder) / "qwen3-33m"), max_batch=64, prefill_tokens=8192)
        driver.engine._batch._costs = None  # the tests' driver knows them; here they are measured
        long = long_row(driver, scale.rounds)
        joins = join_finish(driver, scale.rounds)
        groups = group_prefill(driver, scale.rounds, n=SAMPLES)
    return Section(
        "rows",
        "A long row, joins and groups",
        WHAT,
        (
            Measured("32 rows of 128", "tok/s", (long["tokens_per_s_without"],)),
            Measured("31 rows of 128, one of 4,096", "tok/s", (long["tokens_per_s_with"],)),
            Measured("join and finish, 128 columns", "ms", (joins["ms_small_cache"],)),
            Measured("join and finish, 512 columns", "ms", (joins["ms_4x_cache"],)),
            Measured("prefill of 1,024 tokens, n = 1", "ms", (groups["ms_n_1"],)),
            Measured(f"prefill of 1,024 tokens, n = {SAMPLES}", "ms", (groups[f"ms_n_{SAMPLES}"],)),
        ),
        (
            Ratio("throughput with one row of 4k among 31 of 128 / without", (long["ratio"],), 0.5),
            Ratio("finish + join, cache of 4× the size / once the size", (joins["ratio"],), 1.2, at_most=True),
            Ratio("prefill of a group, n = 16 / n = 1", (groups["ratio"],), 1.1, at_most=True),
        ),
        facts={"rounds within": scale.rounds, "classes of rows": long["classes"]},
    )
