"""Scored groups as Atropos has them, from rollouts of this server: for its API (`--send`), or as a file of JSON lines.

    rollout-server serve                                        # in one terminal: the embedded model
    python examples/clients/atropos_groups.py > groups.jsonl            # in another; needs trainer_client only
    python examples/clients/atropos_groups.py --send http://127.0.0.1:8001      # to a running `run-api` of atroposlib

A group holds the samples of one prompt. `masks` are the tokens, with -100 where nothing is learned; log-probabilities
are 1.0 there. `loss_mask` decides, so that what a tool said in a longer row is masked like the prompt. The base's
log-probabilities, `ref_logprobs`, come with the rollouts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np

from trainer_client import Rollout, RolloutBatch, RolloutClient

MASKED_ID, MASKED_LOGPROB = -100, 1.0


def whole_row(row: Rollout, values: np.ndarray, masked: float) -> list[Any]:
    """`values` of the row's tokens behind as many `masked` as its prompt has tokens, and `masked` instead of what the
    policy did not write. Raises `ValueError` where a token that is learned from has none."""
    if np.isnan(values[row.loss_mask > 0]).any():
        raise ValueError("Some tokens have no value: rows that went on must be rejoined with those they began as.")
    return [masked] * len(row.prompt_token_ids) + np.where(row.loss_mask > 0, values, masked).tolist()


def scored_groups(batch: RolloutBatch, scores: Sequence[float]) -> list[dict[str, Any]]:
    """A `ScoredDataGroup` for each prompt, but those whose samples are all equally good: there is nothing to learn.

    Raises `ValueError` if the rows were sampled with a temperature or a filter: choose another denominator then."""
    sampled = np.split(batch.denominator("unmodified"), batch.offsets[1:-1])
    advantages = batch.advantages(scores)
    groups = []
    for prompt in dict.fromkeys(batch.prompt_index.tolist()):
        rows = np.flatnonzero(batch.prompt_index == prompt).tolist()
        if len({scores[at] for at in rows}) == 1:
            continue
        group: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "masks", "scores", "advantages", "inference_logprobs", "ref_logprobs")
        }
        for at in rows:
            row = batch[at]
            group["tokens"].append([*row.prompt_token_ids.tolist(), *row.token_ids.tolist()])
            group["masks"].append(whole_row(row, row.token_ids, MASKED_ID))
            group["scores"].append(float(scores[at]))
            group["advantages"].append([float(advantages[at])] * len(group["tokens"][-1]))
            group["inference_logprobs"].append(whole_row(row, sampled[at], MASKED_LOGPROB))
            if row.base_logprobs is not None:
                group["ref_logprobs"].append(whole_row(row, row.base_logprobs, MASKED_LOGPROB))
        versions = [{"policy": span.policy, "version": span.version} for at in rows for span in batch[at].spans]
        groups.append({**group, "generation_params": {"versions": versions}})
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--policy", default="base")
    parser.add_argument("--send", help="where Atropos's API listens")
    options = parser.parse_args()
    draw = random.Random(0)
    sums = [(draw.randrange(100), draw.randrange(100)) for _ in range(8)]
    with RolloutClient(options.url) as client:
        batch = client.rollouts(
            [f"{a}+{b}=" for a, b in sums],
            policy=options.policy,
            n=8,
            max_tokens=16,
            seed=1,
            returns=("text", "sampling_logprobs", "base_logprobs"),
        )
    answers = [str(sum(sums[row.prompt_index])) for row in batch]
    scores = [
        float(row.finish_reason == "stop" and row.text == answer) for row, answer in zip(batch, answers, strict=True)
    ]
    groups = scored_groups(batch, scores)
    if options.send:
        reply = httpx.post(f"{options.send}/scored_data_list", json=groups).raise_for_status()
        print(reply.json())
    else:
        for group in groups:
            print(json.dumps(group))


if __name__ == "__main__":
    main()
