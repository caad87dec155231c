"""Kill −9 of replicas at random moments, under load and while versions are pushed: every request is answered once, no
row ran under a version older than acknowledged before it was sent, and all rows are those of an engine that lives,
with the log-probabilities that it gives them under the version that they say they are of.

    python -m tests.support.fleet.kill_replicas --kills 500
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.engine.messages.scoring import Replay
from rollout_server.engine.messages.versions import Publish
from rollout_server.errors import EngineUnavailable, ReplicaLost
from rollout_server.fleet.children import Children
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.rollout import FinishReason, PolicyAddress, Rollout, RolloutRequest, SamplingParams, SpanAddress
from tests.support import tiny_models
from tests.support.engine.driver import recorded
from tests.support.numbers.bounds import TINY

NAME, CONTENTS, TOKENS, SAMPLES = "trained", 6, 24, 3
PUSH_S, TOLD_EVERY = 0.3, 25
CLOSE = 1e-4
"""Of a draw's number to an edge; log-probabilities of float32 in batches of other shapes are as near."""
AT_ONCE = 1000
"""Requests that the engine nobody kills is asked at once: no more than its queue takes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """A group, and the newest version that was acknowledged before it was sent."""

    prompt: tuple[int, ...]
    seeds: tuple[int, ...]
    floor: int


@dataclass
class Seen:
    rows: list[tuple[Asked, Rollout]] = field(default_factory=list)
    pushes: int = 0
    refused: int = 0
    """Pushes that were told to come again."""
    kills: int = 0
    lost: int = 0
    """Requests that were told to come again, because three replicas had died under one of their rows."""
    ties: int = 0
    """Rows with other ids than an engine that lives draws, at a tie."""
    digests: dict[int, str] = field(default_factory=dict)
    """Of each version."""


def fleet_handle(path: Path, replicas: int, *, silent_s: float = 30.0, **options: object) -> EngineHandle:
    engine = EngineOptions(str(path), "tiny", **{"kv_memory": 2**24, **options})  # type: ignore[arg-type]
    return EngineHandle(
        engine, partial(Fleet, FleetOptions(replicas, silent_s=silent_s), partial(Children, replicas, ()))
    )


def request(asked: Asked, policy: PolicyAddress, id: str) -> RolloutRequest:
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    return RolloutRequest(id, asked.prompt, sampling, policy, n=len(asked.seeds), seeds=asked.seeds)


def bundles(handle: EngineHandle, count: int = CONTENTS) -> list[AdapterBundle]:
    layers = handle.info.layers
    made = (tiny_models.random_adapter(layers, 4, seed, dora=seed % 3 == 0) for seed in range(count))
    return [read_bundle(save(tensors), config, layers=layers) for tensors, config in made]


async def push(handle: EngineHandle, bundle: AdapterBundle, name: str = NAME) -> int:
    published = await handle.publish(Publish(handle.new_id("publish"), name, bundle))
    return published.version.number


class Run:
    """A trainer and its clients against a fleet, until so many replicas were killed."""

    def __init__(self, handle: EngineHandle, seed: int) -> None:
        self.handle, self.random = handle, random.Random(seed)
        self.seen, self.acknowledged, self.over = Seen(), 0, False

    async def clients(self, number: int) -> None:
        count = 0
        while not self.over:
            count += 1
            id = f"r{number}-{count}"
            prompt = tuple(self.random.randrange(1, 250) for _ in range(self.random.choice((5, 40))))
            seeds = tuple(self.random.randrange(2**53) for _ in range(SAMPLES))
            asked = Asked(prompt, seeds, self.acknowledged)
            try:
                rows = [
                    event.rollout
                    async for event in self.handle.submit(id, [request(asked, PolicyAddress(NAME), id)])
                    if isinstance(event, RowFinished)
                ]
            except ReplicaLost:
                # Three died under it, which is an answer: a client asks again.
                self.seen.lost += 1
                continue
            if sorted(row.sample_index for row in rows) != list(range(SAMPLES)):
                raise AssertionError(f"{id} was answered with samples {[row.sample_index for row in rows]}")
            self.seen.rows += [(asked, row) for row in rows]

    async def trainer(self, contents: list[AdapterBundle]) -> None:
        while not self.over:
            bundle = contents[self.seen.pushes % len(contents)]
            try:
                number = await push(self.handle, bundle)
            except EngineUnavailable:
                self.seen.refused += 1
            else:
                self.seen.pushes, self.acknowledged = self.seen.pushes + 1, number
                self.seen.digests[number] = bundle.digest
            await asyncio.sleep(PUSH_S)

    async def killer(self, kills: int, within_s: float) -> None:
        end = time.monotonic() + within_s
        while self.seen.kills < kills and time.monotonic() < end:
            await asyncio.sleep(self.random.uniform(0.1, 1.0))
            live = [replica for replica in self.handle.status.replicas if replica.state == "live" and replica.pid]
            # The last one is left, or most of the time would be spent in waiting for another.
            if len(live) > 1:
                os.kill(self.random.choice(live).pid or 0, signal.SIGKILL)
                self.seen.kills += 1
                if self.seen.kills % TOLD_EVERY == 0:
                    sys.stderr.write(f"{self.seen.kills} kills, {len(self.seen.rows)} rows\n")
        self.over = True


async def run(
    path: Path, kills: int, replicas: int = 3, seed: int = 0, clients: int = 4, within_s: float = math.inf
) -> Seen:
    """Raises `AssertionError` with what was wrong. Beyond `within_s` seconds nobody is killed any more."""
    handle = fleet_handle(path, replicas)
    handle.start()
    await handle.wait_ready()
    going = Run(handle, seed)
    contents = bundles(handle)
    going.acknowledged = await push(handle, contents[-1])
    going.seen.digests[going.acknowledged] = contents[-1].digest
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(going.trainer(contents))
        tasks.create_task(going.killer(kills, within_s))
        for number in range(clients):
            tasks.create_task(going.clients(number))
    await handle.close()
    await check(path, going.seen)
    return going.seen


async def check(path: Path, seen: Seen) -> None:
    """Every row against an engine in this process."""
    one = EngineHandle(EngineOptions(str(path), "tiny", kv_memory=2**24))
    one.start()
    await one.wait_ready()
    names = {}
    for index, bundle in enumerate(bundles(one)):
        await push(one, bundle, f"content-{index}")
        names[bundle.digest] = f"content-{index}"
    groups: dict[tuple[Asked, str], list[Rollout]] = {}
    for asked, row in seen.rows:
        if row.finish_reason is not FinishReason.LENGTH or len(row.token_ids) != TOKENS:
            raise AssertionError(f"a row ended as {row.finish_reason}: {row.error}")
        (span,) = row.spans
        if span.version.number < asked.floor:
            raise AssertionError(f"{span.version} ran after {asked.floor} was acknowledged")
        groups.setdefault((asked, span.version.digest), []).append(row)

    others: list[tuple[Rollout, str]] = []

    async def same(index: int, asked: Asked, digest: str, rows: list[Rollout]) -> None:
        own = replace(asked, seeds=tuple(row.seed for row in rows))
        events = one.submit(f"c{index}", [request(own, PolicyAddress(names[digest]), f"c{index}")])
        expected = {event.rollout.seed: event.rollout async for event in events if isinstance(event, RowFinished)}
        for row in rows:
            if row.token_ids != expected[row.seed].token_ids:
                others.append((row, digest))
            else:
                scored_alike(row, expected[row.seed].logprobs)

    for some in batched(enumerate(groups.items()), AT_ONCE):
        async with asyncio.TaskGroup() as tasks:
            for index, ((asked, digest), rows) in some:
                tasks.create_task(same(index, asked, digest, rows))
    seen.ties = len(others)
    for some_rows in batched(others, AT_ONCE):
        await drawn_at_ties(one, some_rows, names)
    await one.close()
    versions = Counter(len({row.spans[0].version for row in rows}) for rows in groups.values())
    if set(versions) - {1}:
        raise AssertionError(f"samples of one group ran under several versions: {versions}")


def scored_alike(row: Rollout, expected: Sequence[float]) -> None:
    """Raises `AssertionError` unless these are a row's log-probabilities, under the version that it says."""
    gap = float(np.max(np.abs(np.subtract(row.logprobs, expected))))
    if not gap <= TINY.of_row(row):
        raise AssertionError(f"a row of {row.spans[0].version} has log-probabilities off by {gap}")


async def drawn_at_ties(one: EngineHandle, rows: list[tuple[Rollout, str]], names: Mapping[str, str]) -> None:
    """A row that came out otherwise was drawn where its number falls as near to the edge between two tokens as sums in
    another order move it: an engine with other rows beside it draws the other one."""
    sent = [
        recorded(row, spans=(SpanAddress(PolicyAddress(names[digest]), 0, len(row.token_ids), digest),))
        for row, digest in rows
    ]
    replayed = await one.replay(Replay(one.new_id("ties"), tuple(sent)))
    for (row, _), again in zip(rows, replayed.rows, strict=True):
        if not (again.exact or (again.margin is not None and again.margin <= CLOSE)):
            raise AssertionError(f"{row.token_ids} came of seed {row.seed}, and not at a tie: {again}")
        if not (again.max_abs_logprob_difference or 0.0) <= TINY.of_row(row):
            raise AssertionError(f"a row of {row.spans[0].version} has log-probabilities off: {again}")


def batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """So many at a time; `itertools` has it from Python 3.12 on."""
    left = iter(items)
    while some := list(islice(left, count)):
        yield some


async def until(reached: Callable[[], object], within_s: float = 120.0) -> None:
    """Waits until `reached()` is true."""
    end = time.monotonic() + within_s
    while not reached():
        if time.monotonic() > end:
            raise AssertionError("it did not happen in time")
        await asyncio.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=math.inf, help="seconds after which nobody is killed any more")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("qwen3", Path(folder) / "tiny")
        seen = asyncio.run(run(model, given.kills, given.replicas, given.seed, within_s=given.within))
    sys.stdout.write(
        f"{seen.kills} kills, {len(seen.rows)} rows, {seen.pushes} pushes ({seen.refused} told to come again), "
        f"{seen.lost} requests told to come again after three deaths: every request answered once, no row under an "
        f"older version, all as in an engine that nobody kills, but for {seen.ties} drawn at a tie\n"
    )


if __name__ == "__main__":
    main()
