"""Section `fairness`: what streamed rows wait for their next token while prompts are read and others are scored.

`python -m benchmarks.sections.engine.fairness [--rounds 5] [--turns 60] [--prefer latency]` prints the same as one
table; with `--prefer latency` nobody streams, and the engine is told to treat rows as if somebody did.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.record import Measured, Ratio, Scale, Section
from rollout_server.machine.blas import load_fast_blas
from rollout_server.rollout import Wants

if TYPE_CHECKING:
    from rollout_server.engine.messages.options import Prefer
    from tests.support.engine.driver import Driver

ROWS = (16, 2)
LONG, SCORED, EMBEDDED = 3000, 1500, 700
WHAT = (
    "The engine, driven turn by turn in this process: a turn gives every running row one token. 16 rows, and 2, with "
    "prompts of 20 tokens decode and are streamed, so that what is read beside them is bounded. First that is nothing, "
    "then prompts of 3,000 tokens, sequences of 1,500 to score whole or, as base_logprobs are, from their middle on, "
    "texts of 700 to embed, or all together, more of each as it ends. Turns of a round come right after each other, so "
    "that drift of the machine hits both; the first turn beside each counts. The median is asked for; the 95th "
    "percentile and the longest are told."
)


@dataclass(frozen=True, slots=True)
class Turns:
    """Milliseconds of turns in a row, and the tokens that were read in them."""

    alone: tuple[float, ...]
    beside: tuple[float, ...]
    read: int

    def times(self, figure: Callable[[tuple[float, ...]], float]) -> float:
        """A figure of the turns beside, in undisturbed turns."""
        return figure(self.beside) / statistics.median(self.alone)

    @property
    def rate(self) -> float:
        """Tokens read a second."""
        return 1e3 * self.read / sum(self.beside)


def p95(turns: tuple[float, ...]) -> float:
    return sorted(turns)[int(0.95 * (len(turns) - 1))]


def section(scale: Scale) -> Section:
    found = measure_all(scale.rounds, 120 if scale.full else 60)
    measured, ratios = [], []
    for name, rounds in found.items():
        measured.append(Measured(f"{name}: turn", "ms", tuple(statistics.median(turns.beside) for turns in rounds)))
        measured.append(Measured(f"{name}: read", "tok/s", tuple(turns.rate for turns in rounds)))
        for figure, call, asked in (("median", statistics.median, 2.0), ("p95", p95, None), ("longest", max, None)):
            times = tuple(turns.times(call) for turns in rounds)
            ratios.append(Ratio(f"{name}: {figure} turn / undisturbed", times, asked, at_most=True))
    for rows in ROWS:
        alone = next(rounds for name, rounds in found.items() if name.startswith(f"{rows} rows"))
        turns = tuple(statistics.median(each.alone) for each in alone)
        measured.append(Measured(f"{rows} rows: undisturbed turn", "ms", turns))
    return Section("fairness", "Running rows beside what is read", WHAT, tuple(measured), tuple(ratios))


def measure_all(rounds: int, turns: int, prefer: Prefer = "throughput") -> dict[str, list[Turns]]:
    """Turns of each round, by what stood beside; one round to warm up. Rows stream unless latency is preferred."""
    from benchmarks.model import write_model
    from tests.support.engine.driver import Driver

    found: dict[str, list[Turns]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "qwen3-33m")
        driver = Driver.start(path, clock=time.perf_counter, max_batch=32, prefer=prefer)
        driver.learn_costs()  # As at the start of a server.
        for number in range(rounds + 1):
            for rows in ROWS:
                for name, ask in beside(driver, number).items():
                    one = measure_one(driver, rows, turns, ask, wants=Wants(tokens_as_they_come=prefer == "throughput"))
                    if number:
                        found.setdefault(f"{rows} rows, {name}", []).append(one)
            print(f"  round {number}/{rounds}", file=sys.stderr, flush=True)
    return found


def beside(driver: Driver, seed: int) -> Mapping[str, Callable[[], list[str]]]:
    """What is read beside rows: each call asks for more of it and returns the ids."""
    from tests.support.engine.driver import prompts_of

    vocabulary, count = driver.model.info.vocab_size, iter(range(1000 * seed, 1000 * seed + 1000))

    def tokens(length: int, many: int = 1) -> list[list[int]]:
        return prompts_of([length] * many, vocabulary, seed=next(count))

    prompt = lambda: [driver.submit(tokens(LONG), max_tokens=1)]  # noqa: E731
    score = lambda: [driver.ask_score(tokens(SCORED))]  # noqa: E731
    base = lambda: [driver.ask_score(tokens(SCORED, 2), [SCORED // 2] * 2)]  # noqa: E731
    embed = lambda: [driver.ask_embed(tokens(EMBEDDED, 3))]  # noqa: E731
    return {
        "prompts": prompt,
        "scoring": score,
        "base_logprobs": base,
        "embeddings": embed,
        "all of these": lambda: [*prompt(), *score(), *base(), *embed()],
    }


def measure_one(
    driver: Driver, rows: int, turns: int, ask: Callable[[], list[str]], *, wants: Wants | None = None
) -> Turns:
    """`wants` is what the running rows are asked for."""
    from tests.support.engine.driver import prompts_of

    vocabulary = driver.model.info.vocab_size
    running = prompts_of([20] * rows, vocabulary)
    ids = [driver.submit(running, wants=wants, max_tokens=4 * turns + 200, ignore_eos=True)]
    driver.until(lambda: len(driver.batches.rows) == rows)
    driver.turn(10)
    alone = [turn(driver) for _ in range(turns)]
    driver.events.clear()
    before, found = read(driver), []
    ids += ask()
    for _ in range(turns):
        if all(over(driver, id) for id in ids[1:]):
            ids += ask()
        found.append(turn(driver))
    tokens = read(driver) - before
    for id in ids:
        driver.abort(id)
    driver.turn(4)
    driver.until(lambda: not driver.batches.active)
    driver.events.clear()
    return Turns(tuple(alone), tuple(found), tokens)


def over(driver: Driver, id: str) -> bool:
    return any(getattr(event, "id", None) == id for event in driver.events)


def turn(driver: Driver) -> float:
    began = time.perf_counter()
    driver.turn()
    return 1e3 * (time.perf_counter() - began)


def read(driver: Driver) -> int:
    """Tokens of prompts and of what is scored that the budget has counted."""
    return driver.tokens_read


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sections.engine.fairness", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, taken in turns")
    parser.add_argument("--turns", type=int, default=60, help="turns undisturbed, and as many beside")
    parser.add_argument("--prefer", choices=("throughput", "latency"), default="throughput")
    options = parser.parse_args()
    if min(options.rounds, options.turns) < 1:
        parser.error("--rounds and --turns must be at least 1")
    print(load_fast_blas(), file=sys.stderr)
    print(f"{'beside':<24} {'undisturbed':>11} {'median':>7} {'p95':>6} {'longest':>8} {'read tok/s':>11}")
    for name, rounds in measure_all(options.rounds, options.turns, options.prefer).items():
        alone = statistics.median(statistics.median(turns.alone) for turns in rounds)
        median, late, longest = (
            statistics.median(turns.times(call) for turns in rounds) for call in (statistics.median, p95, max)
        )
        rate = statistics.median(turns.rate for turns in rounds)
        print(f"{name:<24} {alone:>8.1f} ms {median:>7.2f} {late:>6.2f} {longest:>8.2f} {rate:>11.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
