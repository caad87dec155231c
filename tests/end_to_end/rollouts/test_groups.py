"""Partial rollouts, tool use and pausing through real HTTP and the client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.support import tiny_models
from tests.support.live_server import Server, server_here, until
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutBatch, RolloutClient, continued, rejoined

PROMPTS = [[5, 9, 33], [100, 20, 7, 8, 9, 10, 11, 250]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("groups") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with server_here(model) as live:
        yield live


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url) as client:
        yield client


def test_partial_rollouts_become_what_they_would_have_been(client: RolloutClient) -> None:
    stops = list(range(0, 320, 20))
    options = {"n": 6, "seed": 4, "max_tokens": 120, "stop_token_ids": stops, "temperature": 0.9, "top_p": 0.95}
    returns = ["sampling_logprobs", "entropy", "base_logprobs"]
    whole = client.rollouts(PROMPTS, returns=returns, **options)  # type: ignore[arg-type]
    partial = client.rollouts(PROMPTS, returns=returns, return_when={"finished": 2}, **options)  # type: ignore[arg-type]
    assert partial.complete
    rest = [row for row in partial if row.finish_reason == "aborted"]
    assert rest and all(row.stop_reason == "return_when" for row in rest)
    further = client.rollouts(rest, returns=returns, **{**options, "n": 1})  # type: ignore[arg-type]
    done = [row for row in partial if row.finish_reason != "aborted"]
    rows = sorted([*done, *rejoined(further, rest)], key=lambda row: (row.prompt_index, row.sample_index))
    joined = RolloutBatch.of(rows)
    assert joined.token_ids.tolist() == whole.token_ids.tolist()
    for name in ("logprobs", "sampling_logprobs", "log_kept_mass", "entropy", "base_logprobs"):
        times = 10 if name == "entropy" else 2  # A kept mass is the difference of two.
        assert_near(getattr(joined, name), getattr(whole, name), times * TINY.of_batch(whole), name)
    assert joined.loss_mask.all() and joined.seeds.tolist() == whole.seeds.tolist()


def test_a_tool_speaks_between_two_turns(client: RolloutClient, model: Path) -> None:
    layers = tiny_models.linear_layers(model)
    first = client.push("tools", *tiny_models.random_adapter(layers, 4, 1))
    turn = client.rollouts(PROMPTS, policy="tools", max_tokens=6, ignore_eos=True)
    second = client.push("tools", *tiny_models.random_adapter(layers, 4, 2))
    tool = [40, 41, 42]
    prompts = [continued(row, tool) for row in turn]
    both = client.rollouts(prompts, policy="tools", max_tokens=15, ignore_eos=True)
    for row, before in zip(both, turn, strict=True):
        assert row.token_ids[:9].tolist() == [*before.token_ids.tolist(), *tool]
        assert row.loss_mask.tolist() == [1] * 6 + [0] * 3 + [1] * 6
        assert row.logprobs[:6].tobytes() == before.logprobs.tobytes() and np.isnan(row.logprobs[6:9]).all()
        spans = [(span.digest, span.start, span.end, span.kv) for span in row.spans]
        assert spans == [(first.digest, 0, 9, "recomputed"), (second.digest, 9, 15, "recomputed")]
    both.assert_synced(second, max_staleness=1)
    # every span under its own version, on KV of its own: the first is what the first turn saw
    scored = client.logprobs(both, versions=both.spans)
    assert_near(scored.logprobs[both.loss_mask == 1], both.logprobs[both.loss_mask == 1], TINY.of_batch(both))
    again = client.rollouts(both, policy="tools", max_tokens=16, ignore_eos=True)
    assert [len(row.token_ids) for row in again] == [16, 16]
    assert [[span.digest for span in row.spans] for row in again] == [[first.digest, second.digest, second.digest]] * 2


def test_a_paused_server_takes_pushes(client: RolloutClient, model: Path) -> None:
    tensors = tiny_models.random_adapter(tiny_models.linear_layers(model), 4, 3)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(client.rollouts, PROMPTS, max_tokens=1500, ignore_eos=True, id="long")
        until(lambda: client.pause("keep").running == 2 or not client.resume())
        frozen = client.pause("abort")
        assert (frozen.paused, frozen.mode) == (True, "abort")
        batch = running.result(60)
        assert not batch.complete and {row.stop_reason for row in batch} == {"pause"}
        waiting = pool.submit(client.rollouts, PROMPTS, policy="base", max_tokens=4)
        until(lambda: client.pause().waiting == 1)
        version = client.push("quiet", *tensors)
        assert version.live and not waiting.done()
        assert not client.resume().paused
        assert waiting.result(60).complete
    client.rollouts(PROMPTS, policy="quiet", max_tokens=4).assert_synced(version)
