"""Contenders that are no decode loops: calls that return a figure, measured in turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from benchmarks.record import Measured


def take_turns(contenders: Mapping[str, Callable[[], float]], unit: str, rounds: int) -> dict[str, Measured]:
    """Call each once to warm up, then `rounds` times in turns; what a call returns is its figure."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, call in contenders.items():
            figure = call()
            if number:
                found[name].append(figure)
        if number:
            line = ", ".join(f"{name} {figures[-1]:.4g}" for name, figures in found.items())
            print(f"  round {number}/{rounds}: {line} {unit}", file=sys.stderr, flush=True)
    return {name: Measured(name, unit, tuple(figures)) for name, figures in found.items()}
