"""What the section about a trainer's step concludes from its rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measure import take_turns_with
from benchmarks.record import Measured
from benchmarks.sections.order import SECTIONS
from benchmarks.sections.server import step
from benchmarks.whole_job.job import Job


def test_it_is_the_first_section() -> None:
    assert next(iter(SECTIONS)) == "step"


def test_ratios_are_taken_within_each_round() -> None:
    job = Job(Path(), prompts=2, n=4, prompt_tokens=11, tokens=5)  # 20 tokens are read, 40 are sampled.
    rates = {
        f"{step.BASE}, {step.SECOND}": (4.0, 5.0),
        f"{step.LORA}, {step.FIRST}": (2.0, 1.0),
        f"{step.LORA}, {step.SECOND}": (3.0, 4.0),
        step.GENERATOR: (2.0, 2.0),
        step.SERVER: (1.0, 4.0),
        "prefill alone": (10.0, 20.0),
        "decode alone": (8.0, 10.0),
    }
    found = {ratio.name: ratio for ratio in step.ratios(job, {n: Measured(n, "tok/s", r) for n, r in rates.items()})}
    assert found[f"{step.LORA}, {step.SECOND} / BatchGenerator"].rounds == (1.5, 2.0)
    assert found[f"{step.LORA}, {step.SECOND} / mlx_lm.server"].rounds == (3.0, 1.0)
    slowdown = found[step.SLOWDOWN]
    # 10 s of a step whose parts take 2 + 5, and 8 s of one whose parts take 1 + 4.
    assert slowdown.rounds == (10 / 7, 8 / 5) and slowdown.met is False


def test_contenders_with_several_figures_take_turns_by_round() -> None:
    called: list[tuple[str, int]] = []

    def one(number: int) -> dict[str, float]:
        called.append(("one", number))
        return {"a": number, "b": 2 * number}

    def other(number: int) -> dict[str, float]:
        called.append(("other", number))
        return {"c": -number}

    found = take_turns_with([one, other], "s", 2)
    assert called == [("one", 1), ("other", 1), ("one", 2), ("other", 2)]
    assert {name: measured.rounds for name, measured in found.items()} == {"a": (1, 2), "b": (2, 4), "c": (-1, -2)}
    assert pytest.approx(3.0) == found["b"].median
