"""How near a whole job comes to its parts: prompts × n through a batch, against prefill alone and decode alone.

    python -m benchmarks.studies.whole_job [--rounds 3] [--prompts 32] [--rows 64] [--uneven] [--model DIRECTORY]

The engine, driven turn by turn in this process, over the 33M-parameter model: no HTTP and no client. The job's time is
divided by prompt tokens ÷ prefill rate + sampled tokens ÷ decode rate, each rate measured alone right before it in the
same engine, so that drift of the machine hits both. `--uneven` lets every row stop at a length of its own, as rows that
sample an end do; the rate of full batches is then out of reach, since the last rows run among few. `--processor-time`
counts what this process computed instead of what passed, on a CPU that others use meanwhile; `--timeline FILE` keeps
every turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.record import Measured, Ratio
from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    from tests.support.engine.driver import Driver

Clock = Callable[[], float]
"""Seconds."""
MOST = 1.1
"""What the job may take of its parts."""


@dataclass(frozen=True, slots=True)
class Job:
    """`prompts` × `n` rows through a batch of `rows`; a turn may read `most` tokens."""

    prompts: int = 32
    n: int = 8
    rows: int = 64
    prompt_tokens: int = 256
    tokens: int = 128
    most: int = 512
    uneven: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn did: seconds, prompt tokens read, rows of its steps, and the batches that stepped."""

    seconds: float
    read: int
    rows: int
    steps: int


@dataclass(frozen=True, slots=True)
class Round:
    """Tokens a second of each part alone, seconds of the job, and what its turns did."""

    prefill: float
    decode: float
    seconds: float
    read: int
    sampled: int
    turns: tuple[Turn, ...]

    @property
    def times(self) -> float:
        """The job in units of its parts."""
        return self.seconds / (self.read / self.prefill + self.sampled / self.decode)


def measure(job: Job, rounds: int, clock: Clock = time.perf_counter, model: Path | None = None) -> list[Round]:
    """Rounds of one engine; one before them to warm up."""
    from benchmarks.model import write_model
    from tests.support.engine.driver import Driver

    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = model or write_model(Path(folder) / "qwen3-33m")
        driver = Driver.start(path, clock=clock, max_batch=job.rows, prefill_tokens=job.most)
        driver.learn_costs()
        for number in range(rounds + 1):
            one = _round(driver, job, number, clock)
            if number:
                found.append(one)
            print(f"  round {number}/{rounds}: {one.times:.3f} times its parts", file=sys.stderr, flush=True)
        costs = driver.reading_costs
    print(f"reading: {1e3 * costs.fixed:.2f} ms + {1e6 * costs.per_token:.1f} µs a token", file=sys.stderr)
    return found


def _round(driver: Driver, job: Job, seed: int, clock: Clock) -> Round:
    groups = job.rows // job.n
    prefill = _run(driver, job, clock, 3 * seed, count=job.prompts, n=1, until_read=True)
    decode = _run(driver, job, clock, 3 * seed + 1, count=groups, n=job.n)
    decoding = [turn for turn in decode if not turn.read]
    whole = _run(driver, job, clock, 3 * seed + 2, count=job.prompts, n=job.n)
    return Round(
        sum(turn.read for turn in prefill) / sum(turn.seconds for turn in prefill if turn.read),
        sum(turn.rows for turn in decoding) / sum(turn.seconds for turn in decoding),
        sum(turn.seconds for turn in whole),
        sum(turn.read for turn in whole),
        sum(turn.rows for turn in whole),
        tuple(whole),
    )


def _run(
    driver: Driver, job: Job, clock: Clock, seed: int, *, count: int, n: int, until_read: bool = False
) -> list[Turn]:
    """The turns of `count` prompts with `n` samples each, until all rows are done or, with `until_read`, until no
    prompt is left to read."""
    from tests.support.engine.driver import prompts_of

    vocabulary = driver.model.info.vocab_size
    prompts = prompts_of([job.prompt_tokens] * count, vocabulary, seed=seed)
    # One id in so many of a model that draws nearly evenly: rows stop after `tokens` on average.
    stops = tuple(range(1, vocabulary, job.tokens)) if job.uneven and not until_read else ()
    most = 4 * job.tokens if stops else job.tokens
    id = driver.submit(prompts, n=n, seed=seed, max_tokens=most, ignore_eos=True, stop_token_ids=stops)
    turns = []
    while not driver.over(id):
        read, sampled, steps, began = driver.tokens_read, driver.status.tokens, driver.status.steps, clock()
        driver.turn()
        seconds = clock() - began
        turns.append(
            Turn(seconds, driver.tokens_read - read, driver.status.tokens - sampled, driver.status.steps - steps)
        )
        if until_read and driver.tokens_read - read == 0:
            driver.abort(id)
    while driver.busy:
        driver.turn()
    driver.events.clear()
    return turns


def figures(rounds: list[Round]) -> tuple[tuple[Measured, ...], tuple[Ratio, ...]]:
    """For a section of the report."""
    return (
        Measured("prefill alone", "tok/s", tuple(one.prefill for one in rounds)),
        Measured("decode alone", "tok/s", tuple(one.decode for one in rounds)),
        Measured("the whole job", "tok/s", tuple(one.sampled / one.seconds for one in rounds)),
    ), (Ratio("whole job / its parts alone", tuple(one.times for one in rounds), MOST, at_most=True),)


def timeline(turns: tuple[Turn, ...]) -> list[str]:
    """Where the turns of a job went, by what they did."""
    kinds = {
        "read": [turn for turn in turns if turn.read and not turn.steps],
        "read and step": [turn for turn in turns if turn.read and turn.steps],
        "step": [turn for turn in turns if not turn.read and turn.steps],
        "neither": [turn for turn in turns if not turn.read and not turn.steps],
    }
    found = [f"{'turns that':<14} {'count':>6} {'seconds':>8} {'tokens read':>12} {'rows a step':>12}"]
    for name, those in kinds.items():
        read, rows = sum(turn.read for turn in those), sum(turn.rows for turn in those)
        mean = rows / max(1, sum(turn.steps for turn in those))
        found.append(f"{name:<14} {len(those):>6} {sum(turn.seconds for turn in those):>8.2f} {read:>12} {mean:>12.1f}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.whole_job", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each part, taken in turns")
    parser.add_argument("--prompts", type=int, default=Job().prompts, help="each with 8 samples")
    parser.add_argument("--rows", type=int, default=Job().rows, help="that decode together")
    parser.add_argument("--prompt-tokens", type=int, default=Job().prompt_tokens)
    parser.add_argument("--tokens", type=int, default=Job().tokens, help="sampled by each row")
    parser.add_argument("--most", type=int, default=Job().most, help="tokens that a turn may read")
    parser.add_argument("--model", type=Path, help="a model to measure instead")
    parser.add_argument("--uneven", action="store_true", help="rows stop at lengths of their own")
    parser.add_argument("--processor-time", action="store_true", help="count what was computed, not what passed")
    parser.add_argument("--timeline", type=Path, help="every turn of the last round, as JSON")
    options = parser.parse_args()
    print(load_fast_blas(), file=sys.stderr)
    job = Job(
        prompts=options.prompts,
        rows=options.rows,
        prompt_tokens=options.prompt_tokens,
        tokens=options.tokens,
        most=options.most,
        uneven=options.uneven,
    )
    clock = time.process_time if options.processor_time else time.perf_counter
    rounds = measure(job, options.rounds, clock, options.model)
    measured, ratios = figures(rounds)
    for one in measured:
        print(f"{one.name}: {one.median:.0f} {one.unit}")
    for ratio in ratios:
        print(f"{ratio.name}: {statistics.median(ratio.rounds):.3f} (at most {ratio.asked})")
    print("\n".join(timeline(rounds[-1].turns)))
    if options.timeline:
        options.timeline.write_text(json.dumps([asdict(turn) for turn in rounds[-1].turns]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
