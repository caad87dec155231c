"""Rollouts sent back by the client, over HTTP, on a real model: drawn again, and compared with a trainer's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.rollouts.test_main_job import PROMPTS, adapter
from tests.end_to_end.rollouts.test_scoring import beside
from tests.support import tiny_models
from tests.support.live_server import server_here, until
from tests.support.numbers.bounds import TINY
from trainer_client import Replayed, RolloutBatch, RolloutClient
from trainer_client.errors import ServerError, VersionGone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("recorded") / "qwen3")


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[RolloutClient]:
    with server_here(model, keep_versions=2) as server, RolloutClient(server.url) as client:
        yield client


def assert_again(found: list[Replayed], batch: RolloutBatch) -> None:
    """A replay reads the rows in batches of other shapes: a draw may differ that was a tie to within the bound."""
    bound = TINY.of_batch(batch)
    assert len(found) == len(batch)
    for row in found:
        assert row.exact or (row.margin is not None and row.margin <= bound)
        assert row.max_abs_logprob_difference is not None and row.max_abs_logprob_difference <= bound


def test_rollouts_come_again_from_both_encodings(client: RolloutClient, model: Path) -> None:
    client.push("p", *adapter(model, 1, dora=True))
    options: dict[str, Any] = {
        "policy": "p",
        "n": 2,
        "max_tokens": 24,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "seed": 3,
    }
    batch = client.rollouts(PROMPTS, stop=["zz"], logit_bias={"7": 1.0}, min_tokens=4, **options)
    streamed = RolloutBatch.of(client.stream_rollouts(PROMPTS, **options))
    for rows in (batch, streamed):
        assert_again(client.replay(rows), rows)
    # the seed alone does it, too
    row = batch[3]
    own = options | {"n": 1, "seed": row.seed}
    (again,) = client.rollouts([row.prompt_token_ids], stop=["zz"], logit_bias={"7": 1.0}, min_tokens=4, **own)
    assert again.token_ids.tolist() == row.token_ids.tolist() and again.finish_reason == row.finish_reason


def test_a_continued_row_comes_again(client: RolloutClient, model: Path) -> None:
    """What was given, with and without versions, is read; what was drawn after it is drawn again."""
    client.push("turns", *adapter(model, 7))
    options: dict[str, Any] = {
        "policy": "turns",
        "max_tokens": 20,
        "ignore_eos": True,
        "presence_penalty": 0.5,
        "seed": 4,
    }
    begun = client.rollouts(PROMPTS, **options | {"max_tokens": 6})
    client.push("turns", *adapter(model, 8))
    given = [
        {"token_ids": row.prompt_token_ids, "prefix": {"token_ids": [*row.token_ids.tolist(), 5, 6]}} for row in begun
    ]
    batch = client.rollouts(given, **options)
    assert all(row.spans[0].policy is None and row.spans[1].kv == "recomputed" for row in batch)
    assert batch.loss_mask.reshape(3, 20)[:, :8].sum() == 0
    assert_again(client.replay(batch), batch)
    (probed,) = client.probe(batch, np.where(batch.loss_mask, batch.logprobs, 0.0))
    # Of differences this small it is half the mean square.
    assert probed.tokens == 36 and (probed.rescored.kl or 0) <= TINY.of_batch(batch) ** 2 / 2


def test_a_changed_token_is_found(client: RolloutClient) -> None:
    batch = client.rollouts(PROMPTS, max_tokens=8, ignore_eos=True, seed=5)
    batch.token_ids[batch.offsets[1] + 3] ^= 1
    first, second, third = client.replay(batch)
    assert first.exact and third.exact and not second.exact
    assert second.first_difference == 3 and second.margin is not None and second.margin > 0


def test_switched_rows_come_again_and_freed_versions_are_named(client: RolloutClient, model: Path) -> None:
    client.push("moves", *adapter(model, 1))
    rows = beside(
        client, [[1, 2, 3, 4]] * 2, policy="moves", max_tokens=500, ignore_eos=True, on_update="switch", seed=6
    )
    until(lambda: any(v.rows_in_use for v in client.policy("moves").versions))
    client.push("moves", *adapter(model, 2))
    batch = rows.result()
    assert all(span[-1].kv == "carried" for span in batch.spans)
    assert_again(client.replay(batch), batch)
    for seed in (3, 4):
        client.push("moves", *adapter(model, seed))
    with pytest.raises(VersionGone) as gone:
        client.replay(batch)
    assert gone.value.param == "rollouts[0].versions[0]"
    with pytest.raises(VersionGone) as gone:
        client.probe(batch, batch.logprobs)
    assert gone.value.param == "rollouts[0].versions[0]"


def test_a_trainer_one_version_behind_shows(client: RolloutClient, model: Path) -> None:
    """Its forward still has the weights of the version before."""
    before = client.push("trained", *adapter(model, 5))
    client.push("trained", *adapter(model, 6))
    batch = client.rollouts(PROMPTS, policy="trained", n=2, max_tokens=16, ignore_eos=True)
    (synced,) = client.probe(batch, batch.logprobs)
    assert synced.version.version == 2 and synced.tokens == 96
    assert synced.recorded is not None and synced.recorded.kl == 0 and synced.recorded.ess == 1
    assert synced.rescored.kl is not None and synced.rescored.kl <= TINY.of_batch(batch) ** 2 / 2
    assert synced.rescored.max_abs_difference is not None and synced.rescored.max_abs_difference <= TINY.of_batch(batch)
    old = client.logprobs(batch, policy=before).logprobs
    (behind,) = client.probe(batch, [old[a:b] for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)])
    for against in (behind.recorded, behind.rescored):
        assert against is not None and against.kl is not None and against.kl > 1e-3
        assert against.ess is not None and against.ess < 0.999
    d = old.astype(np.float64) - batch.logprobs
    assert behind.recorded is not None
    assert behind.recorded.kl == pytest.approx(np.mean(np.exp(d) - 1 - d), rel=1e-9)
    assert behind.recorded.mean_ratio == pytest.approx(np.mean(np.exp(d)), rel=1e-9)


def test_tempered_rows_are_probed_at_their_temperature(client: RolloutClient) -> None:
    batch = client.rollouts(PROMPTS, max_tokens=16, temperature=0.7, top_k=20, ignore_eos=True)
    trainer = client.logprobs(batch, policy="base", temperature=0.7).logprobs
    (found,) = client.probe(batch, trainer, temperature=0.7)
    for against in (found.recorded, found.rescored):
        assert against is not None and against.tokens == 48
        assert against.max_abs_difference is not None and against.max_abs_difference <= TINY.of_batch(batch) / 0.7
    (half,) = client.probe(batch, np.where(np.arange(48) % 2, np.nan, trainer), temperature=0.7)
    assert half.tokens == 24
    with pytest.raises(ValueError, match="48 tokens"):
        client.probe(batch, trainer[:-1])
    with pytest.raises(ServerError, match="temperature"):
        client.probe(batch, trainer, temperature=0.0)
