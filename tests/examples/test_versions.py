"""The examples that look at versions: two side by side, and the alarm for a trainer that has fallen behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.compare_versions import Distance, distance
from rollout_server.demo.run import model_directory
from tests.examples.as_written import run_example
from tests.support import tiny_models
from tests.support.live_server import Server
from tests.support.numbers.bounds import EMBEDDED
from trainer_client import RolloutClient

READ = r"(\S+) reads what (\S+) wrote: (\d+) tokens, gap (\S+) on average, (\S+) at most; KL (\S+) ± (\S+) nats a row"
PROMPTS = ["12+34=", "7+8="]


def run(example: str, live: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_example(f"examples/{example}.py", *arguments, "--url", live.url)


@pytest.fixture(scope="module")
def client(live: Server) -> Iterator[RolloutClient]:
    """Of a server with two versions of `compared`."""
    layers = tiny_models.linear_layers(model_directory())
    with RolloutClient(live.url) as client:
        for seed in (1, 2):
            client.push("compared", *tiny_models.random_adapter(layers, 4, seed))
        yield client


def test_a_distance_is_what_the_probe_says(client: RolloutClient) -> None:
    """The slow way stands beside it: one row and one token after another."""
    batch = client.rollouts(PROMPTS, policy="compared@1", n=3, max_tokens=6, temperature=1.0, seed=0)
    found = distance(client, batch, "compared@2")
    other = client.logprobs(batch, policy="compared@2").logprobs
    (probed,) = client.probe(batch, other)
    assert probed.rescored.kl is not None and probed.rescored.max_abs_difference is not None
    bound = EMBEDDED.of_batch(batch) + EMBEDDED.of_logprobs(other, 16)
    assert found.largest_gap == pytest.approx(probed.rescored.max_abs_difference, abs=bound)
    assert found.tokens == probed.rescored.tokens == len(batch.token_ids)
    rows = []
    for row, (start, end) in zip(batch, zip(batch.offsets, batch.offsets[1:], strict=False), strict=True):
        d = [float(a) - float(b) for a, b in zip(other[start:end], row.logprobs, strict=True)]
        rows.append(sum(np.exp(one) - 1 - one for one in d))
    assert found.kl == pytest.approx(np.mean(rows)) and found.kl_error == pytest.approx(np.std(rows, ddof=1) / 6**0.5)
    # The derivative of exp(d) − 1 − d is exp(d) − 1.
    slack = bound * float(np.abs(np.expm1(other.astype(np.float64) - batch.logprobs)).max() + 1)
    assert sum(rows) / found.tokens == pytest.approx(probed.rescored.kl, abs=slack)


def test_a_version_is_at_no_distance_from_itself(client: RolloutClient) -> None:
    batch = client.rollouts(PROMPTS, policy="compared@1", n=1, max_tokens=6, temperature=1.0, seed=0)
    found = distance(client, batch, "compared@1")
    bound = EMBEDDED.of_batch(batch)
    assert found.largest_gap <= bound and 0 <= found.kl <= 6 * bound**2
    assert isinstance(found, Distance) and "tokens" in found.sentence


@pytest.mark.long
def test_two_versions_side_by_side(live: Server, client: RolloutClient, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("12+34=\n7+8=\n")
    options = ("--prompts", str(tmp_path / "prompts"), "--n", "2", "--max-tokens", "6")
    ran = run("compare_versions", live, "compared@1", "compared", *options)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "12+34=" and lines[3] == "7+8=" and all(line.count(" | ") == 2 for line in lines[1:3])
    there, back = (re.fullmatch(READ, line) for line in lines[-2:])
    assert there and back, ran.stdout
    assert there.groups()[:2] == ("compared@2", "compared@1") and back.groups()[:2] == ("compared@1", "compared@2")
    assert float(there[5]) > 0.1, "two random adapters are not near each other"
    same = run("compare_versions", live, "base", "base", *options)
    assert same.stdout.count("| the same\n") == 4, same.stdout + same.stderr


def test_a_version_that_is_not_there_is_named(live: Server) -> None:
    ran = run("compare_versions", live, "base", "nobody")
    assert ran.returncode != 0 and "nobody" in ran.stderr


@pytest.mark.long
def test_a_trainer_one_version_behind_is_told_within_one_step(live: Server) -> None:
    ran = run("watch_mismatch", live, "--steps", "4", "--prompts", "4", "--behind-from", "2")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert [line.split()[1] for line in ran.stdout.splitlines()] == ["0", "1"], "in step until it falls behind"
    told = re.fullmatch(
        r"step 2: watched@(\d+) sampled .* weights of watched@(\d+), 1 version\(s\) behind\.\n", ran.stderr
    )
    assert told and int(told[1]) - int(told[2]) == 1, ran.stderr


@pytest.mark.long
def test_a_trainer_in_step_is_not_told_anything(live: Server) -> None:
    ran = run("watch_mismatch", live, "--steps", "3", "--prompts", "4")
    assert ran.returncode == 0 and ran.stdout.count("agree\n") == 3, ran.stdout + ran.stderr
