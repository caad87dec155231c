"""Section `flood`: far more requests at once than can run: is each answered once, and how long does it wait?"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.model import random_prompts, write_model
from benchmarks.record import Measured, Ratio, Scale, Section
from benchmarks.servers.compared import our_server
from benchmarks.servers.load import Answer, drive, post

CLIENTS, QUEUE, EACH = 512, 2048, 5
SLOTS, PROMPT_TOKENS = 64, 16
PATIENCE_S = 1200
"""After which a request counts as never answered."""
WRONG = ("errors", "not its own reply", "never answered", "connections that broke")
WHAT = (
    "512 clients open five requests each at the same moment, so 2,560 connections at a server that lets 2,048 "
    "requests wait or run (`--max-queue 2048 --max-batch 64`). Refusals (429, with `Retry-After`) are counted apart. "
    "Every other reply must be a 200 that carries its own request's id and all its tokens, once. The wait runs from "
    "connecting to the last byte. It is held against the accepted requests' tokens over the rate that 64 clients "
    "reach before the flood on the same requests."
)


def section(scale: Scale) -> Section:
    tokens = 64 if scale.full else 8
    _allow_files(CLIENTS * EACH + 500)
    rates: list[float] = []
    floods: list[tuple[list[Answer], float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        our_server(
            _written_apart(Path(folder) / "qwen3-33m"), "--max-batch", str(SLOTS), "--max-queue", str(QUEUE)
        ) as url,
    ):
        for number in range((scale.rounds if scale.full else 1) + 1):
            calm = [request(f"calm-{number}-{index}", index, tokens) for index in range(4 * SLOTS)]
            done = asyncio.run(drive(url, "/v1/rollouts", calm, SLOTS))
            if number == 0:
                continue  # The first load warms the server up.
            rates.append(done.tokens() / done.seconds)
            floods.append(asyncio.run(flood(url, number, tokens, CLIENTS * EACH)))
    return report(rates, floods, tokens)


def report(rates: list[float], floods: list[tuple[list[Answer], float]], tokens: int) -> Section:
    counts: Counter[str] = Counter()
    waits, shares = [], []
    for rate, (answers, _) in zip(rates, floods, strict=True):
        counts.update(judge(answer, index, tokens) for index, answer in enumerate(answers))
        counts["connections that broke"] += sum(answer.resets for answer in answers)
        seconds = sorted(answer.seconds for answer in answers if answer.status == 200)
        waits.append(seconds[math.ceil(0.99 * len(seconds)) - 1])
        shares.append(waits[-1] / (len(seconds) * tokens / rate))
    wrong = sum(counts[name] for name in WRONG)
    return Section(
        "flood",
        "512 clients, a queue of 2,048",
        WHAT,
        (
            Measured("tok/s of 64 clients", "tok/s", tuple(rates)),
            Measured("p99 wait in the flood", "s", tuple(waits)),
        ),
        (
            Ratio("p99 wait / (accepted tokens ÷ measured tok/s)", tuple(shares), 1.3, at_most=True),
            Ratio("requests that were neither answered properly nor refused", (float(wrong),), 0.0, at_most=True),
        ),
        facts={
            "requests": sum(len(answers) for answers, _ in floods),
            "floods": len(floods),
            "tokens of a reply": tokens,
            **{name: counts[name] for name in ("answered once", "refused with 429", *WRONG)},
        },
    )


def judge(answer: Answer, index: int, tokens: int) -> str:
    """What became of request number `index`; the load generator itself refuses a second reply on a connection."""
    if answer.status == 429:
        return "refused with 429" if "retry-after" in answer.headers else "errors"
    if answer.status != 200:
        return "errors" if answer.status else "never answered"
    content = answer.content()
    own = content["id"].endswith(f"-{index}") and len(content["rollouts"]) == 1
    return "answered once" if own and len(content["rollouts"][0]["token_ids"]) == tokens else "not its own reply"


async def flood(url: str, number: int, tokens: int, requests: int) -> tuple[list[Answer], float]:
    bodies = [json.dumps(request(f"flood-{number}-{index}", index, tokens)).encode() for index in range(requests)]
    began = time.perf_counter()
    answers = await asyncio.gather(*(patient(url, body) for body in bodies))
    return answers, time.perf_counter() - began


async def patient(url: str, body: bytes) -> Answer:
    """The reply, or one of status 0 where none came in time."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await post(url, "/v1/rollouts", body)
    except TimeoutError:
        return Answer(0, {}, b"", PATIENCE_S, 0)


def request(id: str, index: int, tokens: int) -> dict[str, Any]:
    return {
        "id": id,
        "policy": "base",
        "prompts": [{"token_ids": random_prompts(1, PROMPT_TOKENS, seed=index)[0]}],
        "sampling": {"max_tokens": tokens, "ignore_eos": True, "seed": index},
    }


def _written_apart(directory: Path) -> Path:
    """The model, written by another process: mlx-lm, once imported, limits a process to 2,048 open files for good."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        return apart.submit(write_model, directory).result()


def _allow_files(number: int) -> None:
    """Lift the limit on open files, for this process and the servers it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, number)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise RuntimeError(f"This needs {number} open files; the system allows {hard} (ulimit -Hn).")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
