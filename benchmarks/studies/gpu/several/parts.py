"""The parts: what is asked of replicas, and of ranks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.studies.gpu.figures import Figure, over
from benchmarks.studies.gpu.several.engines import (
    STARTED_S,
    Machine,
    adapter,
    kill,
    live,
    prompts_of,
    push,
    rank_processes,
    rate,
    rows,
    scores,
    until,
)
from benchmarks.studies.gpu.several.sums import seconds_of_sums
from benchmarks.studies.gpu.shapes import SHAPES

LINEAR, CLOSE = 0.95, 1e-4
"""What is asked of replicas beside so many times one; and of float32 log-probabilities of ranks beside one."""


@dataclass(frozen=True, slots=True)
class Study:
    """One shape on one machine. `halves` is its model in bfloat16; `floats` writes it in float32, for one part."""

    machine: Machine
    shape: str
    halves: Path
    floats: Callable[[], Path]
    count: int
    """GPUs that are used together, at most."""
    rounds: int
    prompts: int
    prompt_tokens: int
    samples: int
    tokens: int
    many: tuple[int, ...]
    """Numbers of rows at which decode is measured."""
    turns: int
    push_rank: int

    @property
    def counts(self) -> list[int]:
        """1, 2, 4 … as far as there are GPUs."""
        return [count for count in (1, 2, 4, 8) if count <= self.count]


async def replicas(study: Study) -> AsyncIterator[Figure]:
    """A trainer's step on one engine and on several, and what a push to all of them takes."""
    one: tuple[float, ...] = ()
    for count in study.counts:
        async with study.machine.engines(study.halves, replicas=count) as handle:
            prompts = prompts_of(handle, study.prompts * count, study.prompt_tokens)
            await rate(handle, prompts, study.samples, study.tokens)
            found = tuple([await rate(handle, prompts, study.samples, study.tokens) for _ in range(study.rounds)])
            one = one or found
            yield Figure(f"{count} replicas, step", "tok/s", found)
            if count > 1:
                linear = tuple(count * rate for rate in one)
                yield Figure(f"{count} replicas / {count} times one", "", over(found, linear), LINEAR)
            bundles = [adapter(handle, study.push_rank, seed) for seed in range(study.rounds)]
            staged, flipped = zip(*[await push(handle, "pushed", bundle) for bundle in bundles], strict=True)
            pushed = f"{count} replicas, push of {bundles[0].nbytes / 1e6:.0f} MB to all"
            yield Figure(f"{pushed}: staged", "ms", staged)
            yield Figure(f"{pushed}: flipped", "ms", flipped)


async def replica_killed(study: Study) -> AsyncIterator[Figure]:
    """One of several is killed while all have rows: every row comes back, and is the row that it was."""
    async with study.machine.engines(study.halves, replicas=study.count) as handle:
        prompts = prompts_of(handle, study.prompts * study.count, study.prompt_tokens)
        expected = await rows(handle, prompts, study.samples, study.tokens)
        before = await rate(handle, prompts, study.samples, study.tokens)
        began, running = time.perf_counter(), asyncio.create_task(rows(handle, prompts, study.samples, study.tokens))
        await until(lambda: handle.status.running > 0, STARTED_S)
        kill(handle.status.replicas[-1].pid or 0)
        found = await running
        seconds = time.perf_counter() - began
        same = sum(mine.token_ids == theirs.token_ids for mine, theirs in zip(found, expected, strict=True))
        yield Figure("rows that came back", "of all", (len(found) / len(expected),), 1.0)
        # bfloat16 rows may part at ties where another batch computes them.
        yield Figure("rows equal to those of no kill", "of all", (same / len(expected),))
        yield Figure("throughput before", "tok/s", (before,))
        yield Figure("throughput with the kill", "tok/s", (sum(len(row.token_ids) for row in found) / seconds,))
        back = await until(lambda: live(handle) == study.count, STARTED_S)
        yield Figure("until it is live again, behind the last row", "s", (back,))
        yield Figure("throughput after", "tok/s", (await rate(handle, prompts, study.samples, study.tokens),))


async def exact(study: Study) -> AsyncIterator[Figure]:
    """Log-probabilities and greedy tokens of all ranks beside those of one, with and without adapters."""
    for name, model, bound in (("float32", study.floats(), CLOSE), ("bfloat16", study.halves, None)):
        found: list[dict[str, tuple[list[float], list[tuple[int, ...]]]]] = []
        for ranks in (1, study.count):
            async with study.machine.engines(model, ranks=ranks) as handle:
                prompts = prompts_of(handle, study.prompts, study.prompt_tokens)
                await push(handle, "lora", adapter(handle, 16, 1))
                await push(handle, "dora", adapter(handle, 8, 2, dora=True))
                found.append({
                    policy: (
                        await scores(handle, policy, prompts),
                        [row.token_ids for row in await rows(handle, prompts, 1, study.tokens, policy=policy,
                                                              temperature=0.0)],
                    )
                    for policy in ("base", "lora", "dora")
                })  # fmt: skip
        for policy, (one, greedy) in found[0].items():
            several, drawn = found[1][policy]
            gap = float(np.abs(np.subtract(several, one)).max())
            same = sum(map(np.array_equal, drawn, greedy)) / len(greedy)
            yield Figure(f"{name}, {policy}: log-probabilities apart", "nat", (gap,), bound, at_most=True)
            yield Figure(f"{name}, {policy}: greedy rows equal", "of all", (same,))


async def decode(study: Study) -> AsyncIterator[Figure]:
    """Rows of short prompts, whole, on one GPU and cut over all; and how much of a step is sums."""
    rates: dict[int, dict[int, tuple[float, ...]]] = {}
    for ranks in (1, study.count):
        rates[ranks] = {}
        async with study.machine.engines(study.halves, ranks=ranks) as handle:
            for many in study.many:
                prompts = prompts_of(handle, many, 8)
                await rate(handle, prompts, 1, study.tokens)
                found = [await rate(handle, prompts, 1, study.tokens) for _ in range(study.rounds)]
                rates[ranks][many] = tuple(found)
                yield Figure(f"{many} rows on {ranks} GPUs", "tok/s", tuple(found))
    shape = SHAPES[study.shape]
    for many in study.many:
        yield Figure(f"{many} rows: {study.count} ranks / one", "", over(rates[study.count][many], rates[1][many]))
        summing = seconds_of_sums(study.machine, study.count, many, shape["hidden_size"], shape["num_hidden_layers"])
        step = many / float(np.median(rates[study.count][many]))
        yield Figure(f"{many} rows: sums over ranks, of a step", "", (summing / step,))


async def rank_killed(study: Study) -> AsyncIterator[Figure]:
    """A rank is killed while rows run: the engine ends, is started again, and draws its rows again."""
    async with study.machine.engines(study.halves, ranks=study.count) as handle:
        prompts = prompts_of(handle, study.prompts, study.prompt_tokens)
        expected = await rows(handle, prompts, study.samples, study.tokens)
        running = asyncio.create_task(rows(handle, prompts, study.samples, study.tokens))
        await until(lambda: handle.status.replicas[0].running > 0, STARTED_S)
        kill(rank_processes(handle.status.replicas[0].pid or 0)[0])
        began = time.perf_counter()
        yield Figure("until nobody is live", "s", (await until(lambda: live(handle) == 0, STARTED_S),))
        found = await running
        yield Figure("until every row is back", "s", (time.perf_counter() - began,))
        same = sum(mine.token_ids == theirs.token_ids for mine, theirs in zip(found, expected, strict=True))
        yield Figure("rows equal to those of no kill", "of all", (same / len(expected),))


async def turns(study: Study) -> AsyncIterator[Figure]:
    """Every turn's digest is compared: ranks that did something else would have ended the engine."""
    began = time.perf_counter()
    async with study.machine.engines(study.halves, ranks=study.count, warm=True) as handle:
        yield Figure("until ready, with the shapes of a first batch", "s", (time.perf_counter() - began,))
        left, seen = study.turns, 0
        while left > 0:
            length = min(left, handle.info.max_model_len - 16)
            found = await rows(handle, prompts_of(handle, 2, 8), 1, length)
            seen, left = seen + max(len(row.token_ids) for row in found), left - length
        yield Figure("turns with equal digests", "", (float(seen),), float(study.turns))
        yield Figure("restarts meanwhile", "", (float(handle.status.replicas[0].restarts),), 0.0, at_most=True)
