"""Section `http`: our server and `mlx_lm.server`, 32 clients of one load generator in a third process."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import take_turns
from benchmarks.model import random_texts, write_model
from benchmarks.record import Scale, Section, ratio
from benchmarks.servers.compared import our_server, peer_server
from benchmarks.servers.load import drive

CLIENTS = 32
LETTERS = 150
KINDS = ("plain", "log-probabilities", "log-probabilities and top-p")
WHAT = (
    "Both servers run as processes of their own; 32 clients of one load generator each send `POST /v1/completions` "
    "(text prompts of about 100 tokens, temperature 1) and the next when it is answered, a connection for each "
    "request. Tokens are those the replies count; the time is the whole load's, prefill, JSON and sockets included. "
    "`mlx_lm.server` runs with `--decode-concurrency 32 --prompt-concurrency 32` and the same BLAS. With top-p every "
    "client has its own between 0.9 and 1.0."
)


def section(scale: Scale) -> Section:
    requests, tokens = (2, 128) if scale.full else (1, 64)
    kinds = KINDS if scale.full else (KINDS[0], KINDS[2])
    resets: dict[str, int] = {"ours": 0, "mlx_lm.server": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        our_server(model := write_model(Path(folder) / "qwen3-33m"), "--max-batch", str(CLIENTS)) as ours,
        peer_server(model, CLIENTS) as theirs,
    ):
        urls = {"ours": ours, "mlx_lm.server": theirs}

        def rate(who: str, kind: str) -> float:
            bodies = [request(who, kind, number, tokens) for number in range(CLIENTS * requests)]
            done = asyncio.run(drive(urls[who], "/v1/completions", bodies, CLIENTS))
            resets[who] += done.resets
            return done.tokens() / done.seconds

        calls = {
            f"{who}, {kind}": lambda who=who, kind=kind: rate(who, kind)  # type: ignore[misc]
            for kind in kinds
            for who in urls
        }
        found = take_turns(calls, "tok/s", scale.rounds)
    pairs = [
        ratio(
            f"{kind} / mlx_lm.server",
            found[f"ours, {kind}"],
            found[f"mlx_lm.server, {kind}"],
            2.2 if kind == KINDS[2] else None,
        )
        for kind in kinds
    ]
    facts = {"clients": CLIENTS, "requests of each client": requests, "tokens of a reply": tokens}
    facts |= {f"connections broken by {who}": count for who, count in resets.items()}
    return Section("http", "Over HTTP, 32 clients", WHAT, tuple(found.values()), tuple(pairs), facts=facts)


def request(who: str, kind: str, number: int, tokens: int) -> dict[str, Any]:
    """A body that both servers understand, but for how each is told what to return."""
    body: dict[str, Any] = {
        "prompt": random_texts(1, LETTERS, seed=number)[0],
        "max_tokens": tokens,
        "temperature": 1.0,
    }
    if who == "ours":
        body |= {"model": "base", "ignore_eos": True}
    if kind != KINDS[0]:
        # OpenAI's field counts alternatives, and 0 asks for the sampled tokens'; mlx-lm's is a boolean.
        body["logprobs"] = 0 if who == "ours" else True
    if kind == KINDS[2]:
        body["top_p"] = 0.9 + 0.1 * (number % CLIENTS) / (CLIENTS - 1)
    return body
