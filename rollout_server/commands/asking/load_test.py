"""What `rollout-server bench` measures: a server under clients that stream, under a trainer's rollouts, under pushes.

Prompts are random ids, none twice, so that no reply profits from KV that was kept; rows never end early.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollout_server.commands.asking.sse_client import completion_stream
from trainer_client import AsyncRolloutClient, RolloutClient, ServedModel


@dataclass(frozen=True, slots=True)
class Plan:
    policy: str
    prompt_tokens: int
    max_tokens: int
    rounds: int
    """Requests that each client sends, one after another."""
    seed: int


@dataclass(frozen=True, slots=True)
class Level:
    """Figures of so many clients, each with one request open at a time: medians and 95th percentiles in seconds."""

    clients: int
    tokens_per_s: float
    requests_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    latency_p50_s: float
    latency_p95_s: float
    rollouts_tokens_per_s: float
    """Tokens a second of the same number of rows in one request of `/v1/rollouts` at a time."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: int
    first_s: float
    total_s: float


class Prompts:
    """Ids that the model has and that do not end a text."""

    def __init__(self, model: ServedModel, plan: Plan) -> None:
        ends = set(model.eos_token_ids)
        self._ids = [token for token in range(model.vocab_size or 0) if token not in ends]
        if not self._ids:
            raise RuntimeError(f"The server does not say how large the vocabulary of {model.id} is.")
        self._random = random.Random(plan.seed)
        self._length = plan.prompt_tokens

    def next(self) -> list[int]:
        return self._random.choices(self._ids, k=self._length)


async def measure(client: AsyncRolloutClient, plan: Plan, prompts: Prompts, clients: int) -> Level:
    """One level, after the requests that warm the server up for it."""
    await asyncio.gather(*(_ask(client, plan, prompts.next()) for _ in range(clients)))
    began = time.perf_counter()
    answers = [
        a for told in await asyncio.gather(*(_client(client, plan, prompts) for _ in range(clients))) for a in told
    ]
    seconds = time.perf_counter() - began
    first, total = ([getattr(answer, name) for answer in answers] for name in ("first_s", "total_s"))
    return Level(
        clients=clients,
        tokens_per_s=sum(answer.tokens for answer in answers) / seconds,
        requests_per_s=len(answers) / seconds,
        first_token_p50_s=float(np.percentile(first, 50)),
        first_token_p95_s=float(np.percentile(first, 95)),
        latency_p50_s=float(np.percentile(total, 50)),
        latency_p95_s=float(np.percentile(total, 95)),
        rollouts_tokens_per_s=await _rollouts(client, plan, prompts, clients),
    )


async def _client(client: AsyncRolloutClient, plan: Plan, prompts: Prompts) -> list[Answer]:
    return [await _ask(client, plan, prompts.next()) for _ in range(plan.rounds)]


async def _ask(client: AsyncRolloutClient, plan: Plan, prompt: list[int]) -> Answer:
    asked = {"model": plan.policy, "prompt": prompt, "max_tokens": plan.max_tokens, "ignore_eos": True}
    began, first, tokens = time.perf_counter(), None, 0
    async for event in client.stream(completion_stream(asked)):
        first = time.perf_counter() - began if first is None else first
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    total = time.perf_counter() - began
    return Answer(tokens, total if first is None else first, total)


async def _rollouts(client: AsyncRolloutClient, plan: Plan, prompts: Prompts, rows: int) -> float:
    began, tokens = time.perf_counter(), 0
    for _ in range(plan.rounds):
        asked = [prompts.next() for _ in range(rows)]
        batch = await client.rollouts(asked, policy=plan.policy, max_tokens=plan.max_tokens, ignore_eos=True)
        tokens += len(batch.logprobs)
    return tokens / (time.perf_counter() - began)


def pushes(client: RolloutClient, adapter: Path, count: int) -> dict[str, Any]:
    """Publishes the adapter `count` times under a name of its own, which is deleted in between, so that each is staged
    anew. Milliseconds as the client sees them, and the medians of the server's own phases."""
    seconds, phases = [], []
    for _ in range(count):
        name = f"bench-{secrets.token_hex(4)}"
        began = time.perf_counter()
        pushed = client.push(name, adapter, resend=True)
        seconds.append(time.perf_counter() - began)
        phases.append(pushed.timings_ms)
        client.delete_policy(name)
    found = {"count": count, "p50_ms": float(np.median(seconds)) * 1e3, "max_ms": max(seconds) * 1e3}
    names = phases[0].keys()
    return found | {"server_ms": {name: float(np.median([phase[name] for phase in phases])) for name in names}}
