"""How two things are compared: the same work in one process, in turns, by the medians of several rounds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.record import Measured


class Contender(Protocol):
    """Something that decodes. `run` does one whole measurement and returns (tokens, seconds) of its decode phase."""

    name: str

    def run(self) -> tuple[int, float]: ...


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens per second of one contender, one figure for each round."""

    name: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True, slots=True)
class Load:
    """`rows` prompts of `prompt_tokens` ids, then `steps` timed decode steps.

    The clock starts when the first sampled token of every row has been read by the host and stops when token
    `steps` + 1 of every row has been read. So prefill is outside for everybody, a step that was dispatched ahead is
    in flight at both ends, and each contender is counted rows × steps tokens.
    """

    rows: int = 32
    prompt_tokens: int = 100
    steps: int = 48

    @property
    def tokens(self) -> int:
        return self.rows * self.steps


def interleave(
    contenders: Sequence[Contender], rounds: int, progress: Callable[[str], None] = lambda line: None
) -> list[Result]:
    """Run every contender once to warm up, then `rounds` times in turns, so that drift of the machine hits all."""
    # Whoever imports this loads the BLAS afterwards, which has to come before mlx.
    import mlx.core as mx

    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run()
    for number in range(1, rounds + 1):
        for contender in contenders:
            tokens, seconds = contender.run()
            mx.synchronize()
            rates[contender.name].append(tokens / seconds)
        progress(f"round {number}/{rounds}: " + ", ".join(f"{name} {done[-1]:.0f}" for name, done in rates.items()))
    return [Result(name, tuple(done)) for name, done in rates.items()]


def matmul_gflops(rows: int, inner: int = 2048, columns: int = 2048, repeats: int = 5) -> float:
    """Billions of float32 operations per second of `mx.matmul`, [rows, inner] × [inner, columns]; best of `repeats`."""
    import mlx.core as mx

    a, b = mx.random.normal((rows, inner)), mx.random.normal((columns, inner)).T
    mx.eval(a, b, a @ b)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        mx.eval(a @ b)
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * inner * columns / best / 1e9


def take_turns(contenders: Mapping[str, Callable[[], float]], unit: str, rounds: int) -> dict[str, Measured]:
    """Call each once to warm up, then `rounds` times in turns; what a call returns is its figure."""
    for call in contenders.values():
        call()

    def one(name: str) -> Callable[[int], Mapping[str, float]]:
        return lambda number: {name: contenders[name]()}

    return take_turns_with(list(map(one, contenders)), unit, rounds)


def take_turns_with(
    contenders: Sequence[Callable[[int], Mapping[str, float]]], unit: str, rounds: int
) -> dict[str, Measured]:
    """Call each with the number of the round, `rounds` times in turns; what a call returns are its figures, by name."""
    found: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        for call in contenders:
            for name, figure in call(number).items():
                found.setdefault(name, []).append(figure)
        line = ", ".join(f"{name} {figures[-1]:.4g}" for name, figures in found.items())
        print(f"  round {number}/{rounds}: {line} {unit}", file=sys.stderr, flush=True)
    return {name: Measured(name, unit, tuple(figures)) for name, figures in found.items()}
