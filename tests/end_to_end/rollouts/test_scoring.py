"""`base_logprobs`, spans of switched rows and `wait_s`, by the client, over HTTP, on a real model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.rollouts.test_main_job import PROMPTS, adapter
from tests.support import tiny_models
from tests.support.live_server import server_here, until
from tests.support.numbers.bounds import TINY, assert_near
from trainer_client import RolloutBatch, RolloutClient
from trainer_client.errors import StalePolicy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("scored") / "qwen3")


def beside(client: RolloutClient, prompts: Any, **options: Any) -> Future[RolloutBatch]:
    """Rollouts on a connection and a thread of their own."""

    def ask() -> RolloutBatch:
        with RolloutClient(client._connection.url) as own:
            return own.rollouts(prompts, **options)

    pool = ThreadPoolExecutor(1)
    future = pool.submit(ask)
    pool.shutdown(wait=False)
    return future


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[RolloutClient]:
    with server_here(model) as server, RolloutClient(server.url) as client:
        yield client


def test_base_logprobs_are_those_of_the_scoring_route(client: RolloutClient, model: Path) -> None:
    client.push("ref", *adapter(model, 1, dora=True))
    options: dict[str, Any] = {
        "policy": "ref",
        "n": 3,
        "max_tokens": 16,
        "returns": ["base_logprobs", "sampling_logprobs"],
    }
    batch = client.rollouts(PROMPTS, **options)
    assert batch.base_logprobs is not None and batch.base_logprobs.dtype == np.float32
    reference = client.logprobs(batch, policy="base")
    assert_near(batch.base_logprobs, reference.logprobs, TINY.of_batch(batch))
    assert np.max(np.abs(batch.base_logprobs - batch.logprobs)) > 0.05
    padded = batch.padded()
    assert np.array_equal(padded["base_logprobs"][padded["completion_mask"] == 1], batch.base_logprobs)
    streamed = RolloutBatch.of(client.stream_rollouts(PROMPTS, **options))
    again = client.logprobs(streamed, policy="base")
    assert_near(streamed.base_logprobs, again.logprobs, TINY.of_batch(streamed))
    on_base = client.rollouts(PROMPTS, max_tokens=8, returns=["base_logprobs"])
    assert on_base.base_logprobs is not None and on_base.base_logprobs.tobytes() == on_base.logprobs.tobytes()


def test_a_switched_row_is_read_again_under_its_spans(client: RolloutClient, model: Path) -> None:
    client.push("moves", *adapter(model, 1))
    rows = beside(client, [[1, 2, 3, 4]] * 2, policy="moves", max_tokens=500, ignore_eos=True, on_update="switch")
    until(lambda: any(v.rows_in_use for v in client.policy("moves").versions))
    for seed in (2, 3):
        client.push("moves", *adapter(model, seed))
    batch = rows.result()
    assert all(len(spans) > 1 for spans in batch.spans)
    checked = client.logprobs(batch, policy="moves", versions=batch.spans)
    assert_near(checked.logprobs, batch.logprobs, TINY.of_batch(batch))
    assert [[(s.version, s.start, s.end, s.kv) for s in spans] for spans in checked.spans] == [
        [(s.version, s.start, s.end, s.kv) for s in spans] for spans in batch.spans
    ]
    assert {ref.version for ref in checked.versions} == {s.version for spans in batch.spans for s in spans}
    assert np.max(np.abs(client.logprobs(batch, policy="moves").logprobs - batch.logprobs)) > 1e-3


def test_wait_s_waits_for_the_push_or_says_that_it_did_not_come(client: RolloutClient, model: Path) -> None:
    first = client.push("late", *adapter(model, 4)).version
    waits = beside(client, PROMPTS, policy="late", max_tokens=4, min_version=first + 1, wait_s=60.0)
    other = client.rollouts(PROMPTS, policy="late", max_tokens=4)
    assert {span.version for spans in other.spans for span in spans} == {first} and not waits.done()
    second = client.push("late", *adapter(model, 5))
    waits.result().assert_synced(second)
    with pytest.raises(StalePolicy, match="min_version is 9"):
        client.rollouts(PROMPTS, policy="late", max_tokens=4, min_version=9, wait_s=0.2)
