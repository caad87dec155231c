"""The part about rows that are read as they come: what a turn takes them while prompts are read beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from benchmarks.sections.engine.fairness import beside, measure_one
from benchmarks.studies.gpu.figures import Figure
from benchmarks.studies.gpu.held import Held
from rollout_server.rollout import Wants
from tests.support.engine.driver import Driver

TURNS = 40
BESIDE = ("prompts", "scoring")


def latency(held: Held) -> Iterator[Figure]:
    """Under `--prefer latency`, and without it where the rows are streams."""
    held.free()
    for name, prefer, wants in (
        ("--prefer latency", "latency", Wants()),
        ("streams", "throughput", Wants(tokens_as_they_come=True)),
    ):
        driver = Driver.start(held.path(), clock=time.perf_counter, max_batch=2 * held.size.rows, prefer=prefer)
        driver.learn_costs()
        for rows in (held.size.few, held.size.rows):
            for what, ask in beside(driver, rows).items():
                if what in BESIDE:
                    rounds = [
                        measure_one(driver, rows, TURNS, ask, wants=wants).times(statistics.median)
                        for _ in range(held.rounds + 1)
                    ]
                    label = f"{name}, {rows} rows beside {what}: median turn / undisturbed"
                    yield Figure(label, "", tuple(rounds[1:]), 2.0, at_most=True)
        del driver
        held.free()
