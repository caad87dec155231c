"""Section `arrays`: what the arrays of `/v1/rollouts` cost beside completions without log-probabilities."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import take_turns
from benchmarks.model import random_prompts, write_model
from benchmarks.record import Scale, Section, ratio
from benchmarks.servers.compared import our_server
from benchmarks.servers.load import drive

ROWS, PROMPT_TOKENS = 32, 100
COMPLETIONS = "completions without log-probabilities"
ROLLOUTS = "rollouts with sampling_logprobs and log_kept_mass"
EXTRAS = "the same with entropy and top_logprobs 5"
WHAT = (
    "One request of 32 prompts of 100 token ids to our server, sampled at temperature 1, JSON both ways; tokens over "
    "the time until the last byte of the reply. `/v1/completions` returns text alone."
)


def section(scale: Scale) -> Section:
    tokens = 256 if scale.full else 96
    with (
        tempfile.TemporaryDirectory() as folder,
        our_server(write_model(Path(folder) / "qwen3-33m"), "--max-batch", str(ROWS)) as url,
    ):

        def rate(path: str, body: dict[str, Any]) -> float:
            done = asyncio.run(drive(url, path, [body], 1))
            return done.tokens() / done.seconds

        calls = {
            name: lambda path=path, body=body: rate(path, body)  # type: ignore[misc]
            for name, (path, body) in requests(tokens).items()
        }
        found = take_turns(calls, "tok/s", scale.rounds)
    return Section(
        "arrays",
        "Log-probabilities on and off",
        WHAT,
        tuple(found.values()),
        (
            ratio(f"{ROLLOUTS} / {COMPLETIONS}", found[ROLLOUTS], found[COMPLETIONS], 0.95),
            ratio(f"{EXTRAS} / {COMPLETIONS}", found[EXTRAS], found[COMPLETIONS], 0.85),
        ),
        facts={"rows": ROWS, "prompt tokens": PROMPT_TOKENS, "tokens of a row": tokens},
    )


def requests(tokens: int) -> dict[str, tuple[str, dict[str, Any]]]:
    prompts = random_prompts(ROWS, PROMPT_TOKENS)
    sampling = {"max_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    rollouts = {"policy": "base", "prompts": [{"token_ids": prompt} for prompt in prompts], "sampling": sampling}
    return {
        COMPLETIONS: ("/v1/completions", {"model": "base", "prompt": prompts, **sampling}),
        ROLLOUTS: ("/v1/rollouts", {**rollouts, "return": ["sampling_logprobs"]}),
        EXTRAS: ("/v1/rollouts", {**rollouts, "return": ["sampling_logprobs", "entropy"], "top_logprobs": 5}),
    }
