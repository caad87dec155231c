"""What prefix reuse saves over five turns, what it costs where nothing is ever hit, and what prompts cost rows.

`python -m benchmarks.sections.engine.turns [--rounds 5] [--json]`. Two engines, with and without, in one process and in
turns; medians. `--rows 15 16 17` says instead what so many running rows wait for a token, with prompts and without;
`--samples 4` asks for so many of each prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.record import Curve, Measured, Ratio, Scale, Section
from rollout_server.machine.blas import load_fast_blas

if TYPE_CHECKING:
    from rollout_server.engine.handle import EngineHandle
    from rollout_server.rollout import Rollout


TURNS, FIRST, ADDED, REPLY = 5, 2048, 64, 16
"""A conversation: tokens of the first prompt, of what each further turn adds to the reply before it, and of a reply."""
GROUPS, SAMPLES, PROMPT, LENGTH = 8, 8, 100, 64
"""A load of one turn, whose prompts share nothing."""
ROWS, LONG = 16, 512
"""Rows that decode while prompts of `LONG` tokens arrive one after another."""


class Side:
    """An engine with or without prefix reuse; a context manager."""

    def __init__(self, directory: Path, runner: asyncio.Runner, *, on: bool) -> None:
        from rollout_server.engine.handle import EngineHandle
        from rollout_server.engine.messages.options import EngineOptions

        self.name = "on" if on else "off"
        self._runner = runner
        self._numbers = itertools.count()
        self._handle: EngineHandle = EngineHandle(
            EngineOptions(str(directory), directory.name, max_batch=32, prefix_cache=on)
        )

    def __enter__(self) -> Side:
        self._runner.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._handle.close())

    async def _start(self) -> None:
        self._handle.start()
        await self._handle.wait_ready()

    def converse(self, draw: np.random.Generator, vocabulary: int) -> list[float]:
        """Prefill milliseconds of each turn."""
        prompt = draw.integers(0, vocabulary, FIRST).tolist()
        times = []
        for _ in range(TURNS):
            (row,) = self._runner.run(self._rows([prompt], 1, REPLY))
            times.append(row.timings.prefill_ms)
            prompt = [*prompt, *row.token_ids, *draw.integers(0, vocabulary, ADDED).tolist()]
        return times

    def load(self, draw: np.random.Generator, vocabulary: int) -> float:
        """Tokens per second of groups that share nothing."""
        prompts = draw.integers(0, vocabulary, (GROUPS, PROMPT)).tolist()
        began = time.perf_counter()
        rows = self._runner.run(self._rows(prompts, SAMPLES, LENGTH))
        return sum(len(row.token_ids) for row in rows) / (time.perf_counter() - began)

    def disturb(
        self, draw: np.random.Generator, vocabulary: int, rows: int = ROWS, samples: int = 1
    ) -> tuple[float, float]:
        """Median milliseconds between two tokens of running rows, undisturbed and while long prompts are read, each for
        so many samples of one token."""
        short = draw.integers(0, vocabulary, (rows, 20)).tolist()
        long = draw.integers(0, vocabulary, (3, LONG)).tolist()
        return self._runner.run(self._watch(short, long, samples))

    async def _watch(self, short: list[list[int]], long: list[list[int]], samples: int) -> tuple[float, float]:
        from rollout_server.engine.messages.rollouts import TokensSampled

        times: list[float] = []
        events = self._submit(short, 1, 400, stream=True)
        reading: asyncio.Task[list[float]] | None = None
        async for event in events:
            if not isinstance(event, TokensSampled) or event.prompt_index:
                continue
            times.append(time.perf_counter())
            if len(times) == 40:
                reading = asyncio.create_task(self._read(long, samples))
            if reading is not None and reading.done():
                events.abort()
        if reading is None:
            raise RuntimeError("The rows ended before any prompt came.")
        began, ended = await reading
        gaps = [(after, 1e3 * (after - before)) for before, after in itertools.pairwise(times[5:])]
        alone = [gap for at, gap in gaps if at < began]
        beside = [gap for at, gap in gaps if began < at < ended]
        return statistics.median(alone), statistics.median(beside)

    async def _read(self, prompts: list[list[int]], samples: int) -> list[float]:
        began = time.perf_counter()
        for prompt in prompts:
            await self._rows([prompt], samples, 1)
        return [began, time.perf_counter()]

    async def _rows(self, prompts: list[list[int]], n: int, length: int) -> list[Rollout]:
        from rollout_server.engine.messages.rollouts import RowFinished

        return [event.rollout async for event in self._submit(prompts, n, length) if isinstance(event, RowFinished)]

    def _submit(self, prompts: list[list[int]], n: int, length: int, *, stream: bool = False) -> Any:
        from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams, Wants

        id = f"turns-{next(self._numbers)}"
        groups = [
            RolloutRequest(
                id=id,
                prompt_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=length, ignore_eos=True),
                policy=PolicyAddress("base"),
                n=n,
                prompt_index=index,
                seeds=tuple(range(n)),
                wants=Wants(tokens_as_they_come=stream and index == 0),
            )
            for index, prompt in enumerate(prompts)
        ]
        return self._handle.submit(id, groups)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sections.engine.turns", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side, taken in turns")
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="so many running rows beside prompts, alone")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt, with --rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, progress on stderr")
    options = parser.parse_args()
    if min([options.rounds, options.samples, *options.rows]) < 1:
        parser.error("--rounds, --rows and --samples must be at least 1")
    blas = load_fast_blas()  # Before anything imports mlx.
    if options.rows:
        measure_rows(options.rounds, options.rows, options.samples)
        return 0
    report = {"blas": blas.name, "rounds": options.rounds, **measure(options.rounds)}
    print(json.dumps(report, indent=2) if options.json else "\n".join(lines(report)))
    return 0


def measure_rows(rounds: int, counts: Sequence[int], samples: int) -> None:
    """Prints what these numbers of running rows wait for a token, undisturbed and beside prompts of so many samples, in
    turns."""
    from benchmarks.model import VOCAB_SIZE, write_model

    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner() as runner,
        Side(write_model(Path(folder) / "qwen3-33m"), runner, on=True) as side,
    ):
        for number in range(rounds + 1):
            for rows in counts:
                alone, beside = side.disturb(np.random.default_rng([number, rows]), VOCAB_SIZE, rows, samples)
                if number:  # The one before the first warms up.
                    print(f"{rows} rows: {alone:.1f} ms, beside prompts {beside:.1f}, {beside / alone:.2f} times")


def measure(rounds: int) -> dict[str, Any]:
    from benchmarks.model import VOCAB_SIZE, write_model

    turns: dict[str, list[list[float]]] = {"on": [], "off": []}
    loads: dict[str, list[float]] = {"on": [], "off": []}
    gaps: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        directory = write_model(Path(folder) / "qwen3-33m")
        with Side(directory, runner, on=True) as on, Side(directory, runner, on=False) as off:
            for number in range(rounds + 1):
                # The same draws for both; the round before the first warms up.
                for side in (on, off):
                    talk = side.converse(np.random.default_rng(3 * number), VOCAB_SIZE)
                    load = side.load(np.random.default_rng(3 * number + 1), VOCAB_SIZE)
                    if number:
                        turns[side.name].append(talk)
                        loads[side.name].append(load)
                gap = on.disturb(np.random.default_rng(3 * number + 2), VOCAB_SIZE)
                if number:
                    gaps.append(gap)
                print(f"round {number}/{rounds}: {[round(ms) for ms in talk]} ms, {load:.0f} tok/s", file=sys.stderr)
    second = {name: statistics.median(talk[1] / talk[0] for talk in talks) for name, talks in turns.items()}
    return {
        "prefill_ms": {
            name: [round(statistics.median(t), 1) for t in zip(*talks, strict=True)] for name, talks in turns.items()
        },
        "second_turn_of_first": {name: round(ratio, 3) for name, ratio in second.items()},
        "tokens_per_s_without_hits": {name: round(statistics.median(rates), 1) for name, rates in loads.items()},
        "share_kept_without_hits": round(
            statistics.median(a / b for a, b in zip(loads["on"], loads["off"], strict=True)), 3
        ),
        "between_tokens_ms": {
            "undisturbed": round(statistics.median(alone for alone, _ in gaps), 1),
            "beside_prompts": round(statistics.median(beside for _, beside in gaps), 1),
            "ratio": round(statistics.median(beside / alone for alone, beside in gaps), 2),
        },
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    for name, times in report["prefill_ms"].items():
        ratio = report["second_turn_of_first"][name]
        yield f"prefill of turns 1 to {TURNS}, reuse {name}: {times} ms, second / first {ratio}"
    rates = report["tokens_per_s_without_hits"]
    yield f"no hits: {rates['on']} tok/s with, {rates['off']} without, {report['share_kept_without_hits']} of it"
    gaps = report["between_tokens_ms"]
    yield (
        f"between two tokens: {gaps['undisturbed']} ms undisturbed, {gaps['beside_prompts']} beside prompts of {LONG} "
        f"tokens, {gaps['ratio']} times"
    )


WHAT = (
    f"A conversation of {TURNS} turns: a first prompt of {FIRST:,} tokens, then the reply ({REPLY} tokens) and "
    f"{ADDED} new ones are added each time; prefill milliseconds as the engine reports them, with and without prefix "
    "reuse. A load of which nothing is ever hit shows what keeping prefixes costs; the time between two tokens of "
    "running rows, what prompts that arrive beside them cost."
)


def section(scale: Scale) -> Section:
    report = measure(scale.rounds)
    prefill, second, gaps = report["prefill_ms"], report["second_turn_of_first"], report["between_tokens_ms"]
    return Section(
        "turns",
        "Prefix reuse over five turns",
        WHAT,
        tuple(measured(report)),
        (
            Ratio("prefill of the second turn / the first", (second["on"],), 0.15, at_most=True),
            Ratio("the same without reuse", (second["off"],)),
            Ratio("throughput where nothing is hit, with / without", (report["share_kept_without_hits"],)),
            Ratio("time between tokens, beside prompts / undisturbed", (gaps["ratio"],), 2.0, at_most=True),
        ),
        tuple(
            Curve(f"reuse {name}", "turn", "prefill, ms", tuple(enumerate(times, 1))) for name, times in prefill.items()
        ),
        facts={"rounds within": scale.rounds},
    )


def measured(report: dict[str, Any]) -> list[Measured]:
    turns = [
        Measured(f"prefill of turn {turn}, reuse {name}", "ms", (ms,))
        for name, times in report["prefill_ms"].items()
        for turn, ms in enumerate(times, 1)
    ]
    loads = [
        Measured(f"nothing hit, reuse {name}", "tok/s", (rate,))
        for name, rate in report["tokens_per_s_without_hits"].items()
    ]
    return [*turns, *loads]


if __name__ == "__main__":
    sys.exit(main())
