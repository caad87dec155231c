"""What the study of overlapping loops makes of its runs."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks.studies.async_loop.__main__ import Loop, Run, figures, measure, ratios
from tests.laws.grids import some_long

PLAIN, HALF, OVERLAPPING = Loop("plain", 0, 2), Loop("half", 0, 1), Loop("overlapping", 1, 1)
LOOPS = (PLAIN, HALF, OVERLAPPING)


def run(*reached: float, seconds: float = 1.0) -> Run:
    return Run(dict(zip((0.9, 0.95, 0.98), reached, strict=False)), seconds, 1.5, 1, ((1.0, 0.5),))


def test_the_quicker_of_the_others_is_what_a_round_is_held_against() -> None:
    runs = {
        PLAIN: [run(10.0, 20.0), run(10.0, 20.0), run(30.0)],
        HALF: [run(8.0, 40.0), run(20.0), run(12.0)],
        OVERLAPPING: [run(4.0, 10.0), run(8.0, 30.0), run(12.0, 50.0, seconds=0.5)],
    }
    found = ratios(LOOPS, runs)
    assert found["0.9"] == 0.8, "the median of 0.5, 0.8 and 1"
    assert found["0.95"] is None, "in the last round only one of them arrived"
    assert found["0.98"] is None and found["a step"] == 1.0
    json.dumps({loop.name: figures(runs[loop]) for loop in LOOPS}, allow_nan=False)


@pytest.mark.parametrize("loop", some_long([HALF, OVERLAPPING], OVERLAPPING), ids=lambda loop: loop.name)
@pytest.mark.long
def test_a_short_study_measures_each_loop_on_its_server(loop: Loop) -> None:
    """Each has a process for its server, and one for its trainer."""
    runs = measure((loop,), argparse.Namespace(rounds=1, steps=2, prompts=2))
    ((found, (measured,)),) = runs.items()
    assert found == loop and measured.staleness <= loop.staleness
    assert measured.seconds > 0 and measured.busy > 0 and len(measured.rewards) == 2
