"""What rewards in the call cost, over HTTP: a batch of rollouts with a reward against its parts laid end to end.

`python -m benchmarks.studies.rewards.in_the_call [--rounds 5] [--prompts 16] [--n 8] [--prompt 256] [--tokens 128]
[--rows 32] [--even] [--json]`. In each round, in turns and of prompts of its own: rollouts alone; the rewards of those
rows alone, asked for afterwards; and rollouts that come with their reward. The reward model is a LoRA version of the
base with a head, which is the random model of the other benchmarks. Rows end one by one, as rows that sample an end do,
or with `--even` all at once. The rate of rows is what was sampled by the time that the last row ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.model import SHAPE, VOCAB_SIZE, random_prompts, write_model
from benchmarks.servers.processes import server
from tests.support import tiny_models
from trainer_client import RolloutBatch, RolloutClient

TOGETHER, RATE = 1.1, 0.85
"""What a batch with rewards may take of its parts, at most, and what rows keep of their rate, at least."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of each job, and tokens a second until the last row ended, without and with rewards."""

    rollouts: float
    rewards: float
    together: float
    rate: float
    rate_beside: float


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.rewards.in_the_call", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each job, taken in turns")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=8, help="samples of each")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="sampled by each row, or on average")
    parser.add_argument("--rows", type=int, default=32, help="that decode together")
    parser.add_argument("--even", action="store_true", help="rows have one length")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args()
    rounds = measure(options)
    found = {
        "rollouts alone, s": statistics.median(one.rollouts for one in rounds),
        "rewards alone, s": statistics.median(one.rewards for one in rounds),
        "rollouts with rewards, s": statistics.median(one.together for one in rounds),
        "with rewards / laid end to end": statistics.median(
            one.together / (one.rollouts + one.rewards) for one in rounds
        ),
        "rate of rows with / without": statistics.median(one.rate_beside / one.rate for one in rounds),
    }
    if options.json:
        print(json.dumps(found))
        return 0
    asked = {"with rewards / laid end to end": f"≤ {TOGETHER}", "rate of rows with / without": f"≥ {RATE}"}
    for name, value in found.items():
        print(f"{name:34} {value:8.3f}  {asked.get(name, '')}".rstrip())
    return 0


def measure(options: argparse.Namespace) -> list[Round]:
    """Rounds of one server; one before them to warm up."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        directory = write_model(Path(place))
        serve = ("-m", "rollout_server", "serve", "--model", str(directory), "--port", "0")
        with server(*serve, "--max-batch", str(options.rows)) as served, RolloutClient(served.url) as client:
            push_reward_model(client, directory)
            for number in range(options.rounds + 1):
                one = _round(client, options, number)
                if number:
                    found.append(one)
                print(f"round {number} of {options.rounds}: {one}", file=sys.stderr)
    return found


def push_reward_model(client: RolloutClient, directory: Path) -> None:
    tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(directory), 16, 1)
    width = int(SHAPE["hidden_size"])
    head = np.random.default_rng(1).normal(size=(1, width)).astype(np.float32) / width**0.5
    tensors["base_model.model.score.weight"] = head
    client.push("rm", tensors, {**config, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]})


def _round(client: RolloutClient, options: argparse.Namespace, number: int) -> Round:
    rollouts, batch = _rollouts(client, options, 2 * number)
    began = time.perf_counter()
    client.rewards(batch, model="rm")
    rewards = time.perf_counter() - began
    together, rewarded = _rollouts(client, options, 2 * number + 1, reward="rm")
    if rewarded.rewards is None or np.isnan(rewarded.rewards).any():
        raise RuntimeError("A row came without its reward.")
    # Jobs of other prompts sample another number of tokens: both are told for one and the same.
    per_token = rollouts / sampled(batch), rewards / sampled(batch), together / sampled(rewarded)
    seconds = [each * sampled(batch) for each in per_token]
    return Round(*seconds, rate_of(batch), rate_of(rewarded))


def _rollouts(
    client: RolloutClient, options: argparse.Namespace, seed: int, reward: str | None = None
) -> tuple[float, RolloutBatch]:
    prompts = random_prompts(options.prompts, options.prompt, seed=1000 + seed)
    # One id in so many of a model that draws nearly evenly: rows stop after `tokens` on average.
    stops = [] if options.even else list(range(1, VOCAB_SIZE, options.tokens))
    most = options.tokens if options.even else 4 * options.tokens
    began = time.perf_counter()
    batch = client.rollouts(
        prompts, n=options.n, seed=seed, max_tokens=most, ignore_eos=True, stop_token_ids=stops, reward=reward
    )
    return time.perf_counter() - began, batch


def sampled(batch: RolloutBatch) -> int:
    return sum(len(row.token_ids) for row in batch)


def rate_of(batch: RolloutBatch) -> float:
    """Tokens a second until the last row ended, by what its row says of its time."""
    return 1000.0 * sampled(batch) / max(sum(row.timings_ms.values()) for row in batch)


if __name__ == "__main__":
    raise SystemExit(main())
