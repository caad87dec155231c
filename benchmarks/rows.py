"""What rows cost each other: a long one among short ones, joining and finishing, a group's prompt.

`python -m benchmarks.rows [--rounds 5] [--json]`. The engine is driven turn by turn in this process; every ratio is of
medians measured in turns. `long_row`, `join_finish` and `group_prefill` can be called with any engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout_server.blas import load_fast_blas

if TYPE_CHECKING:
    from tests.engine.driver import Driver

SHORT_ROWS, SHORT, LONG = 31, 128, 4096


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, taken in turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    blas = load_fast_blas()  # Before anything imports mlx, hence the imports inside the functions below.
    print(blas, file=sys.stderr)

    from benchmarks.models import write_model
    from tests.engine.driver import Driver

    with tempfile.TemporaryDirectory() as folder:
        driver = Driver.start(write_model(Path(folder) / "qwen3-33m"), max_batch=64, prefill_tokens=8192)
        report = {
            "long_row": long_row(driver, options.rounds),
            "join_finish": join_finish(driver, options.rounds),
            "group_prefill": group_prefill(driver, options.rounds),
        }
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


def table(report: dict[str, Any]) -> str:
    return "\n".join(f"{name:<14} {key:<28} {value}" for name, part in report.items() for key, value in part.items())


def long_row(driver: Driver, rounds: int, steps: int = 16) -> dict[str, Any]:
    """Tokens per second of 31 rows of 128 tokens, without and with one of 4,096 among them."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    classes = 1
    for number in range(rounds + 1):
        for among in (False, True):
            lengths = [SHORT] * SHORT_ROWS + [LONG if among else SHORT]
            ids, rows = _running(driver, lengths, 4 * steps + 64), len(lengths)
            seconds = _turns(driver, steps)
            classes = max(classes, driver.engine._batch.classes(0))
            if number:
                rates[among].append(rows * steps / seconds)
            _end(driver, ids)
    without, among_them = statistics.median(rates[False]), statistics.median(rates[True])
    costs = driver.engine._batch._costs
    return {
        "tokens_per_s_without": round(without, 1),
        "tokens_per_s_with": round(among_them, 1),
        "ratio": round(among_them / without, 3),
        "classes": classes,
        "pass_ms": round(1e3 * costs.weights, 2) if costs else None,
        "cell_us": round(1e6 * costs.cell, 3) if costs else None,
    }


def join_finish(driver: Driver, rounds: int, joins: int = 12) -> dict[str, Any]:
    """Milliseconds a row costs that joins and finishes at once, beside 24 rows of 128 columns and of four times that,
    over what the same turns cost without it."""
    extra: dict[int, list[float]] = {SHORT: [], 4 * SHORT: []}
    for number in range(rounds + 1):
        for length, found in extra.items():
            ids = _running(driver, [length] * 24, 8 * joins + 64)
            plain, coming = [], []
            for _ in range(joins):
                plain.append(_turns(driver, 3))
                ids.append(driver.submit([[7] * 8], max_tokens=1, ignore_eos=True))
                coming.append(_turns(driver, 3))
            if number:
                found.append(1e3 * (statistics.median(coming) - statistics.median(plain)))
            _end(driver, ids)
    small, large = (statistics.median(found) for found in extra.values())
    return {"ms_small_cache": round(small, 2), "ms_4x_cache": round(large, 2), "ratio": round(large / small, 3)}


def group_prefill(driver: Driver, rounds: int, length: int = 1024, n: int = 16) -> dict[str, Any]:
    """Seconds from a group's submission until all its rows are seated: one sample and `n`."""
    taken: dict[int, list[float]] = {1: [], n: []}
    for number in range(rounds + 1):
        for samples, found in taken.items():
            prompt = _prompts(driver, [length], seed=100 * number + samples)
            began = time.perf_counter()
            id = driver.submit(prompt, n=samples, max_tokens=2, ignore_eos=True)
            driver.until(lambda samples=samples: len(driver.engine._batch.rows) == samples)  # type: ignore[misc]
            if number:
                found.append(time.perf_counter() - began)
            _end(driver, [id])
    one, many = (statistics.median(found) for found in taken.values())
    return {"ms_n_1": round(1e3 * one, 1), f"ms_n_{n}": round(1e3 * many, 1), "ratio": round(many / one, 3)}


def _prompts(driver: Driver, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    from tests.engine.driver import prompts_of

    return prompts_of(lengths, driver.model.info.vocab_size, seed)


def _running(driver: Driver, lengths: Sequence[int], tokens: int) -> list[str]:
    """Rows with prompts of these lengths, in the middle of decoding."""
    id = driver.submit(_prompts(driver, lengths), max_tokens=tokens, ignore_eos=True)
    driver.until(lambda: len(driver.engine._batch.rows) == len(lengths))
    driver.turn(18)
    return [id]


def _turns(driver: Driver, count: int) -> float:
    began = time.perf_counter()
    driver.turn(count)
    return time.perf_counter() - began


def _end(driver: Driver, ids: Sequence[str]) -> None:
    for id in ids:
        driver.abort(id)
    driver.finish(*ids)
    driver.until(lambda: not driver.engine._batch.active)
    driver.events.clear()


if __name__ == "__main__":
    sys.exit(main())
