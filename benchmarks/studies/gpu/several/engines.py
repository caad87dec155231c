"""Engines in processes of their own, on as many GPUs as each part asks for, and what is asked of them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from benchmarks.model import random_prompts
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions, RankOptions
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.engine.messages.scoring import Score
from rollout_server.engine.messages.versions import Publish
from rollout_server.fleet.children import Children
from rollout_server.fleet.fleet import Fleet, FleetOptions
from rollout_server.rollout import PolicyAddress, Rollout, RolloutRequest, SamplingParams
from tests.support.tiny_models import random_adapter

STARTED_S, STATE_S = 600.0, 0.01


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: names of GPUs, or none, where a CPU says whether the study works."""

    gpus: tuple[str, ...]
    backend: str

    @asynccontextmanager
    async def engines(
        self, model: Path, replicas: int = 1, ranks: int = 1, *, warm: bool = False
    ) -> AsyncIterator[EngineHandle]:
        """So many engines of so many ranks each, behind one handle. What is not `warm` compiles when it is first asked
        to: parts measure behind a call that does."""
        cut = RankOptions(ranks, self.backend, silent_s=60.0) if ranks > 1 else None
        options = EngineOptions(str(model), "several", ranks=cut, kv_memory=None if self.gpus else 2**26, warm=warm)
        source = partial(Children, replicas, self.gpus[: replicas * ranks])
        handle = EngineHandle(options, partial(Fleet, FleetOptions(replicas, fewest=replicas, silent_s=60.0), source))
        handle.start()
        try:
            await handle.wait_ready()
            await until(lambda: live(handle) == replicas, STARTED_S)
            yield handle
        finally:
            await handle.close()


def live(handle: EngineHandle) -> int:
    return sum(replica.state == "live" for replica in handle.status.replicas)


async def until(reached: Callable[[], object], within_s: float) -> float:
    """The seconds until `reached()` is true. Raises `TimeoutError`."""
    began = time.perf_counter()
    while not reached():
        if time.perf_counter() - began > within_s:
            raise TimeoutError(f"It did not happen within {within_s:g} s.")
        await asyncio.sleep(STATE_S)
    return time.perf_counter() - began


def adapter(handle: EngineHandle, rank: int, seed: int, *, dora: bool = False) -> AdapterBundle:
    """On every linear layer."""
    tensors, config = random_adapter(handle.info.layers, rank, seed, dora=dora)
    return read_bundle(save(tensors), config, layers=handle.info.layers)


async def push(handle: EngineHandle, name: str, bundle: AdapterBundle) -> tuple[float, float]:
    """Milliseconds until every live engine has it, and from then until the name means it everywhere."""
    published = await handle.publish(Publish(handle.new_id("push"), name, bundle))
    return published.stage_ms, published.activate_ms


async def rows(
    handle: EngineHandle, prompts: Sequence[Sequence[int]], samples: int, tokens: int, *, policy: str = "base",
    temperature: float = 1.0,
) -> list[Rollout]:  # fmt: skip
    """Every row, in its order; each has its own seed, so that the same call gives the same rows."""
    id, sampling = handle.new_id("rows"), SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature)
    groups = [
        RolloutRequest(
            id, tuple(prompt), sampling, PolicyAddress(policy), samples, index,
            tuple(range(index * samples, (index + 1) * samples)),
        )
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    found = [event.rollout async for event in handle.submit(id, groups) if isinstance(event, RowFinished)]
    return sorted(found, key=lambda row: (row.prompt_index, row.sample_index))


async def rate(handle: EngineHandle, prompts: Sequence[Sequence[int]], samples: int, tokens: int) -> float:
    """Tokens sampled a second, from the call to the last row."""
    began = time.perf_counter()
    found = await rows(handle, prompts, samples, tokens)
    return sum(len(row.token_ids) for row in found) / (time.perf_counter() - began)


async def scores(handle: EngineHandle, policy: str, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Log-probabilities of every token behind the first of each sequence."""
    given = tuple(tuple(sequence) for sequence in sequences)
    scored = await handle.score(Score(handle.new_id("score"), PolicyAddress(policy), given, (1,) * len(given)))
    return [value for sequence in scored.sequences for value in sequence.logprobs if value is not None]


def prompts_of(handle: EngineHandle, count: int, length: int) -> list[list[int]]:
    return random_prompts(count, min(length, handle.info.max_model_len // 2))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def rank_processes(pid: int) -> list[int]:
    """Processes of the other ranks, which rank 0's has started."""
    found = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]  # fmt: skip
    return [child for child in found if "ranks.follower" in Path(f"/proc/{child}/cmdline").read_text()]
