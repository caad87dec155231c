"""Figures as they are found: one line each, beside what is asked, and a file that holds all of them at any time."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.record import rounded


@dataclass(frozen=True, slots=True)
class Figure:
    """`rounds` are the measurements; `asked` is a lower bound unless `at_most`."""

    name: str
    unit: str
    rounds: tuple[float, ...]
    asked: float | None = None
    at_most: bool = False

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool | None:
        if self.asked is None:
            return None
        return self.value <= self.asked if self.at_most else self.value >= self.asked

    def line(self) -> str:
        spread = f" ({min(self.rounds):.4g} to {max(self.rounds):.4g})" if len(self.rounds) > 1 else ""
        bound = "" if self.asked is None else f", asked {'≤' if self.at_most else '≥'} {self.asked:g}"
        verdict = {None: "", True: ": met", False: ": MISSED"}[self.met]
        return f"{self.name}: {self.value:.4g} {self.unit}{spread}{bound}{verdict}"


class Report:
    """Prints with the time since the start, and writes everything to `path` after each figure, so that a run that is
    cut off has left what it found. Without `judged` nothing is asked of a figure."""

    def __init__(self, path: Path, about: dict[str, Any], *, judged: bool = True) -> None:
        self._path = path
        self._judged = judged
        self._content: dict[str, Any] = {**about, "parts": {}}
        self._began = time.perf_counter()
        self.failed: list[str] = []

    def say(self, line: str) -> None:
        print(f"[{time.perf_counter() - self._began:6.1f} s] {line}", flush=True)

    def measure(self, name: str, question: str, found: Callable[[], Iterable[Figure]]) -> None:
        """One part. What it raises is kept with it, and the next part can run."""
        self.say(f"{name}: {question}")
        began = time.perf_counter()
        part: dict[str, Any] = {"question": question, "figures": []}
        self._content["parts"][name] = part
        try:
            for each in found():
                figure = each if self._judged else replace(each, asked=None)
                part["figures"].append({**asdict(figure), "value": figure.value, "met": figure.met})
                self.say(f"  {figure.line()}")
                self._write()
        except Exception as error:
            part["error"] = f"{type(error).__name__}: {error}"
            self.failed.append(name)
            traceback.print_exc()
            self.say(f"  {name} FAILED: {part['error']}")
        part["seconds"] = time.perf_counter() - began
        self._write()
        sys.stdout.flush()

    def _write(self) -> None:
        self._path.write_text(json.dumps(rounded(self._content), indent=1) + "\n", encoding="utf-8")


def in_turns(
    calls: dict[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, tuple[float, ...]]:
    """What each call returns, `rounds` times in turns, after one time to warm up."""
    if warm_up:
        for call in calls.values():
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return {name: tuple(figures) for name, figures in found.items()}


def over(ones: Iterable[float], others: Iterable[float]) -> tuple[float, ...]:
    """Ratios, round by round."""
    return tuple(one / other for one, other in zip(ones, others, strict=True))
