"""Two versions side by side: the same prompts and seeds, what each writes, and how far apart their distributions are.

    python examples/compare_versions.py policy@1 policy@2
    python examples/compare_versions.py base policy --prompts prompts.txt --n 8    # a prompt a line

Rows of one seed are drawn with the same random numbers, so they part only where the versions do. Each version then
reads what the other wrote: the gap is the difference of log-probabilities at one token, and KL is estimated from the
rows as the sum of exp(d) − 1 − d over their tokens, which is never below 0. Needs numpy and httpx only.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer_client import Rollout, RolloutBatch, RolloutClient

ADDITIONS = ("12+34=", "7+8=", "61+29=", "90+17=")
WIDTH = 32


@dataclass(frozen=True)
class Distance:
    """Of another version from the one that wrote some rows, over their sampled tokens."""

    tokens: int
    mean_gap: float
    """Mean of |d| in nats, d = the other's log-probability − the writer's."""
    largest_gap: float
    kl: float
    """KL(writer ‖ other) of a whole row, in nats."""
    kl_error: float
    """Its standard error; 0 where there is one row."""

    @property
    def sentence(self) -> str:
        gap = f"gap {self.mean_gap:.2e} on average, {self.largest_gap:.2e} at most"
        return f"{self.tokens} tokens, {gap}; KL {self.kl:.2e} ± {self.kl_error:.1e} nats a row"


def distance(client: RolloutClient, batch: RolloutBatch, other: str) -> Distance:
    """From the rows of one version, which the server reads again under another."""
    d = client.logprobs(batch, policy=other).logprobs.astype(np.float64) - batch.logprobs
    sampled = batch.loss_mask == 1
    terms = np.where(sampled, np.expm1(d) - d, 0.0)
    rows = np.bincount(batch.per_token(np.arange(len(batch))), terms, len(batch))
    error = rows.std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
    gaps = np.abs(d[sampled])
    return Distance(len(gaps), float(gaps.mean()), float(gaps.max()), float(rows.mean()), float(error))


def parting(left: Rollout, right: Rollout) -> str:
    """Where two rows of one seed part."""
    pairs = zip(left.token_ids, right.token_ids, strict=False)
    first = next(
        (index for index, (a, b) in enumerate(pairs) if a != b), min(map(len, (left.token_ids, right.token_ids)))
    )
    same = first == len(left.token_ids) == len(right.token_ids)
    return "the same" if same else f"part at token {first}"


def written_by(batch: RolloutBatch) -> str:
    """The one version that wrote the rows, as an address."""
    wrote = {(span.policy, span.version) for spans in batch.spans for span in spans}
    if len(wrote) > 1:
        sys.exit(f"The name moved on between two rows: {sorted(wrote)}. Give a version, as NAME@3.")
    ((name, version),) = wrote
    return str(name) if version == 0 else f"{name}@{version}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("left", help="NAME, NAME@3, NAME@sha256:… or base")
    parser.add_argument("right")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt on each line; else four additions")
    parser.add_argument("--n", type=int, default=4, help="samples of a prompt")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else list(ADDITIONS)
    with RolloutClient(options.url) as client:
        # At temperature 1 without filters `logprobs` are of the distribution that was sampled from.
        asked = {"n": options.n, "max_tokens": options.max_tokens, "temperature": 1.0, "seed": options.seed}
        left, right = (client.rollouts(prompts, policy=policy, **asked) for policy in (options.left, options.right))
        pairs = ((left, written_by(right)), (right, written_by(left)))
        distances = [(written_by(batch), other, distance(client, batch, other)) for batch, other in pairs]
    for a, b in zip(left, right, strict=True):
        if a.sample_index == 0:
            print(prompts[a.prompt_index])
        print(f"  {a.text!r:{WIDTH}} | {b.text!r:{WIDTH}} | {parting(a, b)}")
    for writer, other, found in distances:
        print(f"{other} reads what {writer} wrote: {found.sentence}")


if __name__ == "__main__":
    main()
