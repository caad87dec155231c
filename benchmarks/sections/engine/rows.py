"""Section `rows`: what rows cost each other: a long one among short ones, joining and finishing, a group's prompt."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.model import write_model
from benchmarks.record import Measured, Scale, Section, ratio
from rollout_server.engine.model.resident import ResidentModel
from tests.support.engine.driver import Driver, prompts_of

SHORT_ROWS, SHORT, LONG = 31, 128, 4096
SAMPLES, PROMPT = 16, 1024
WHAT = (
    "The engine, driven turn by turn in this process, each pair in turns. The long row has a prompt of 4,096 tokens "
    "among 31 of 128. Joining and finishing: what a row that comes and goes at once adds to three turns of 24 rows of "
    "128 and of 512 columns. A group's prefill runs from its submission until all its rows are seated; the prompt has "
    "1,024 tokens; groups of one and of 16 run in engines of their own, which keep their KV arrays from one group to "
    "the next as they do under a trainer's load."
)


def section(scale: Scale) -> Section:
    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "qwen3-33m")
        driver = started(path)
        without, among, classes = long_row(driver, scale.rounds)
        small, large = join_finish(driver, scale.rounds)
        one, many = group_prefill(driver, started(path, driver.model), scale.rounds)
    return Section(
        "rows",
        "A long row, joins and groups",
        WHAT,
        (without, among, small, large, one, many),
        (
            ratio("throughput with one row of 4k among 31 of 128 / without", among, without, 0.5),
            ratio("finish + join, cache of 4× the size / once the size", large, small, 1.2, at_most=True),
            ratio("prefill of a group, n = 16 / n = 1", many, one, 1.1, at_most=True),
        ),
        facts={"classes of rows": classes},
    )


def started(path: Path, model: ResidentModel | None = None) -> Driver:
    driver = Driver.start(path, model, max_batch=64, prefill_tokens=8192)
    driver.learn_costs()  # As at the start of a server; the tests' driver says that there are none.
    return driver


def long_row(driver: Driver, rounds: int, steps: int = 16) -> tuple[Measured, Measured, int]:
    """Tokens per second of 32 rows of 128 tokens, and with one of 4,096 in place of one; classes of rows then."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    classes = 1
    for number in range(rounds + 1):
        for among in (False, True):
            lengths = [SHORT] * SHORT_ROWS + [LONG if among else SHORT]
            ids = running(driver, lengths, 4 * steps + 64)
            seconds = turns(driver, steps)
            classes = max(classes, driver.batches.classes(0))
            if number:
                rates[among].append(len(lengths) * steps / seconds)
            end(driver, ids)
    return (
        Measured("32 rows of 128", "tok/s", tuple(rates[False])),
        Measured("31 rows of 128, one of 4,096", "tok/s", tuple(rates[True])),
        classes,
    )


def join_finish(driver: Driver, rounds: int, joins: int = 16) -> tuple[Measured, Measured]:
    """Milliseconds a row costs that joins and finishes at once, beside 24 rows of 128 columns and of four times that,
    over what the same turns cost without it."""
    extra: dict[int, list[float]] = {SHORT: [], 4 * SHORT: []}
    for number in range(rounds + 1):
        for length, found in extra.items():
            ids = running(driver, [length] * 24, 8 * joins + 64)
            plain, coming = [], []
            for _ in range(joins):
                plain.append(turns(driver, 3))
                ids.append(driver.submit([[7] * 8], max_tokens=1, ignore_eos=True))
                coming.append(turns(driver, 3))
            if number:
                found.append(1e3 * (statistics.median(coming) - statistics.median(plain)))
            end(driver, ids)
    small, large = extra.values()
    return (
        Measured("join and finish, 128 columns", "ms", tuple(small)),
        Measured("join and finish, 512 columns", "ms", tuple(large)),
    )


def group_prefill(one: Driver, many: Driver, rounds: int) -> tuple[Measured, Measured]:
    """Milliseconds from a group's submission until all its rows are seated: of one sample in one engine, of `SAMPLES`
    in the other."""
    taken: dict[int, list[float]] = {1: [], SAMPLES: []}
    for number in range(rounds + 1):
        for driver, samples in ((one, 1), (many, SAMPLES)):
            prompt = prompts_of([PROMPT], driver.model.info.vocab_size, seed=100 * number + samples)
            began = time.monotonic()
            id = driver.submit(prompt, n=samples, max_tokens=2, ignore_eos=True)
            while len(driver.batches.rows) < samples:
                driver.turn()
            if number:
                taken[samples].append(1e3 * (max(row.seated_at for row in driver.batches.rows) - began))
            end(driver, [id])
    return (
        Measured("prefill of 1,024 tokens, n = 1", "ms", tuple(taken[1])),
        Measured(f"prefill of 1,024 tokens, n = {SAMPLES}", "ms", tuple(taken[SAMPLES])),
    )


def running(driver: Driver, lengths: Sequence[int], tokens: int) -> list[str]:
    """Rows with prompts of these lengths, in the middle of decoding."""
    id = driver.submit(prompts_of(lengths, driver.model.info.vocab_size, 0), max_tokens=tokens, ignore_eos=True)
    driver.until(lambda: len(driver.batches.rows) == len(lengths))
    driver.turn(18)
    return [id]


def turns(driver: Driver, count: int) -> float:
    began = time.perf_counter()
    driver.turn(count)
    return time.perf_counter() - began


def end(driver: Driver, ids: Sequence[str]) -> None:
    for id in ids:
        driver.abort(id)
    driver.finish(*ids)
    driver.until(lambda: not driver.batches.active)
    driver.events.clear()
