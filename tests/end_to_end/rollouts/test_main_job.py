"""The main job over real HTTP: push, sample, check, swap, under load and with bad input."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from tests.support import tiny_models
from tests.support.live_server import Server, assert_drawn_again, rows_ended, server_here, until
from tests.support.numbers.bounds import TINY, assert_near, relative
from trainer_client import AsyncRolloutClient, Retry, RolloutBatch, RolloutClient
from trainer_client.errors import QueueFull, ServerError

PROMPTS = [[5, 9, 33], [100, 20, 7, 8, 9, 10, 11, 250], [44]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("live") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with server_here(model, keep_versions=4) as live:
        yield live


@pytest.fixture(scope="module")
def narrow(model: Path) -> Iterator[Server]:
    """A server that takes little at once: three requests, one row, and 100 kB."""
    with server_here(model, max_queue=3, max_batch=1, max_body="100KB", max_upload="200KB") as live:
        yield live


@pytest.fixture
def client(server: Server) -> Iterator[RolloutClient]:
    with RolloutClient(server.url) as client:
        yield client


def adapter(
    model: Path, seed: int, kind: Literal["peft", "mlx"] = "peft", **options: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return tiny_models.random_adapter(tiny_models.linear_layers(model), 4, seed, kind=kind, **options)


def sample(client: RolloutClient, policy: str, **options: Any) -> RolloutBatch:
    return client.rollouts(PROMPTS, policy=policy, **{"n": 2, "max_tokens": 12, "seed": 1, **options})


def test_push_sample_score_and_swap_back(client: RolloutClient, model: Path) -> None:
    base = sample(client, "base")
    first = client.push("loop", *adapter(model, 1), label="step-1")
    assert (first.version, first.unchanged) == (1, False)
    one = sample(client, "loop")
    one.assert_synced(first)
    second = client.push("loop", *adapter(model, 2, kind="mlx"))
    two = sample(client, "loop")
    two.assert_synced(second)
    assert base.token_ids.tolist() != one.token_ids.tolist() != two.token_ids.tolist()
    for batch, policy in ((base, "base"), (one, "loop@1"), (two, "loop")):
        scored = client.logprobs(batch, policy=policy)
        assert_near(scored.logprobs, batch.logprobs, TINY.of_batch(batch))
        assert_near(
            batch.sampling_logprobs + batch.log_kept_mass, batch.logprobs, relative(2) * np.abs(batch.logprobs).max()
        )
    assert np.max(np.abs(client.logprobs(two, policy="loop@1").logprobs - two.logprobs)) > 0.1
    client.activate("loop", 1)
    assert_drawn_again(sample(client, "loop"), one)
    line = client.policy("loop")
    assert line.live == 1 and [v.version for v in line.versions] == [1, 2]


def test_filters_keep_the_books(client: RolloutClient) -> None:
    batch = sample(client, "base", temperature=0.7, top_p=0.8, top_k=20, n=8)
    scored = client.logprobs(batch, policy="base", temperature=0.7)
    assert_near(batch.sampling_logprobs + batch.log_kept_mass, scored.logprobs, TINY.of_batch(batch) / 0.7)
    assert np.all(batch.log_kept_mass <= 0) and np.any(batch.log_kept_mass < -0.05)


def test_penalties_and_bias_keep_the_books(client: RolloutClient) -> None:
    free = sample(client, "base", temperature=0.7, n=8)
    options = {"temperature": 0.7, "presence_penalty": 2.0, "repetition_penalty": 1.5, "logit_bias": {7: 5.0}}
    bound = sample(client, "base", n=8, **options)
    assert np.array_equal(bound.token_ids, sample(client, "base", n=8, **options).token_ids)
    assert np.sum(bound.token_ids == 7) > 5 * max(1, np.sum(free.token_ids == 7))
    scored = client.logprobs(bound, policy="base")
    assert_near(bound.logprobs, scored.logprobs, TINY.of_batch(bound))
    assert np.all(bound.log_kept_mass == 0) and np.max(np.abs(bound.sampling_logprobs - bound.logprobs)) > 0.5
    (row, *_) = bound
    assert row.sampling["logit_bias"] == {"7": 5.0} and row.sampling["repetition_penalty"] == 1.5
    assert "presence_penalty=2.0" in str(row.modified_by)


def test_streamed_rollouts_are_the_same_rollouts(client: RolloutClient) -> None:
    whole = sample(client, "base", n=4)
    lines = list(client.stream_rollouts(PROMPTS, policy="base", n=4, max_tokens=12, seed=1))
    assert sorted((r.prompt_index, r.sample_index, tuple(r.token_ids)) for r in lines) == [
        (r.prompt_index, r.sample_index, tuple(r.token_ids)) for r in whole
    ]


def test_echo_gives_the_scorer_s_numbers(server: Server, client: RolloutClient) -> None:
    body = {"model": "base", "prompt": PROMPTS[1], "max_tokens": 0, "echo": True, "logprobs": 3}
    (choice,) = httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status().json()["choices"]
    scored = client.logprobs([PROMPTS[1]], policy="base").logprobs
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert_near(choice["logprobs"]["token_logprobs"][1:], scored[1:], TINY.of_logprobs(scored, len(PROMPTS[1])))
    assert {len(choice["logprobs"][key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {
        len(PROMPTS[1])
    }


def test_a_push_moves_or_ends_running_rows_that_asked_for_it(client: RolloutClient, model: Path) -> None:
    client.push("moving", *adapter(model, 11))
    options: dict[str, Any] = {"policy": "moving", "max_tokens": 1900, "ignore_eos": True, "seed": 1}

    def long(on_update: str) -> RolloutBatch:
        with RolloutClient(client._connection.url) as own:
            return own.rollouts([PROMPTS[0]], on_update=on_update, **options)

    with ThreadPoolExecutor() as pool:
        running = {name: pool.submit(long, name) for name in ("finish", "switch", "abort")}
        until(lambda: sum(v.rows_in_use for v in client.policy("moving").versions) == 3)
        client.push("moving", *adapter(model, 12))
        rows = {name: next(iter(future.result())) for name, future in running.items()}
    seen = {name: [span.version for span in row.spans] for name, row in rows.items()}
    assert seen == {"finish": [1], "switch": [1, 2], "abort": [1]}
    assert {name: row.finish_reason for name, row in rows.items()} == {
        "finish": "length",
        "switch": "length",
        "abort": "superseded",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_ends_the_rows_and_they_count(server: Server, stream: bool) -> None:
    def running() -> int:
        return int(httpx.get(f"{server.url}/health").json()["running"])

    until(lambda: running() == 0)
    before = rows_ended(server.url, "aborted")
    body = {
        "policy": "base",
        "n": 4,
        "prompts": [{"token_ids": [1, 2]}],
        "sampling": {"max_tokens": 2000, "ignore_eos": True},
        "stream": stream,
    }

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asked = asyncio.create_task(client.post(f"{server.url}/v1/rollouts", json=body))
            # Who leaves before the rows run would end none.
            await asyncio.to_thread(until, lambda: running() == 4)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(leave())
    until(lambda: running() == 0)
    until(lambda: rows_ended(server.url, "aborted") == before + 4)


def test_256_clients_mixed_prompts_and_versions_while_pushes_come(server: Server, model: Path) -> None:
    """Each push is followed by one more client, who is never given an older version than was acknowledged to it."""
    generator = np.random.default_rng(0)
    policies = [["base", "busy", "busy"][k % 3] for k in range(256)] + 12 * ["busy"]
    jobs = [([generator.integers(0, 286, size=int(generator.integers(1, 60))).tolist()], name) for name in policies]

    async def one(client: AsyncRolloutClient, k: int) -> RolloutBatch:
        prompts, policy = jobs[k]
        return await client.rollouts(prompts, policy=policy, n=1 + k % 3, max_tokens=4 + k % 13, seed=k)

    async def push(client: AsyncRolloutClient) -> tuple[list[int], list[RolloutBatch]]:
        pushed, followers = [], []
        for seed in range(12):
            pushed.append((await client.push("busy", *adapter(model, 100 + seed))).version)
            followers.append(asyncio.create_task(one(client, 256 + seed)))
            await asyncio.sleep(0.05)
        return pushed, await asyncio.gather(*followers)

    async def run() -> tuple[list[RolloutBatch], list[int]]:
        async with AsyncRolloutClient(server.url, retry=Retry(attempts=1)) as client:
            await client.push("busy", *adapter(model, 99))
            *batches, (pushed, followers) = await asyncio.gather(*(one(client, k) for k in range(256)), push(client))
            return batches + followers, pushed

    batches, pushed = asyncio.run(run())
    assert pushed == list(range(2, 14))
    oldest = [{"base": 0, "busy": 1}[policy] for policy in policies[:256]] + pushed
    for k, batch in enumerate(batches):
        assert len(batch) == 1 + k % 3
        for row in batch:
            assert row.prompt_token_ids.tolist() == jobs[k][0][0]
            assert row.finish_reason in ("stop", "length") and 1 <= len(row.token_ids) <= 4 + k % 13
            assert {span.policy for span in row.spans} == {jobs[k][1]}
            assert min(span.version for span in row.spans) >= oldest[k]
    with RolloutClient(server.url) as client:
        for batch in batches[-4:]:
            (version,) = {span.version for row in batch for span in row.spans}
            assert_near(client.logprobs(batch, policy=f"busy@{version}").logprobs, batch.logprobs, TINY.of_batch(batch))
        for batch in batches[0:12:3]:
            assert_near(client.logprobs(batch, policy="base").logprobs, batch.logprobs, TINY.of_batch(batch))


def test_a_full_queue_says_so_and_loses_nothing(narrow: Server) -> None:
    async def run() -> list[Any]:
        async with AsyncRolloutClient(narrow.url, retry=Retry(attempts=1)) as client:
            calls = [client.rollouts([[3, k]], policy="base", max_tokens=60) for k in range(12)]
            return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(run())
    full = [r for r in results if isinstance(r, QueueFull)]
    assert full and all(error.status == 429 and error.retryable for error in full)
    answered = [r for r in results if isinstance(r, RolloutBatch)]
    assert answered and len(full) + len(answered) == 12


def test_stopping_ends_open_requests_by_name(model: Path) -> None:
    """Here by the end of the server's context; by a signal, in tests/http/test_stopping.py."""
    body = {
        "policy": "base",
        "prompts": [{"token_ids": [1]}],
        "sampling": {"max_tokens": 2040, "ignore_eos": True},
        "n": 48,
    }
    with ThreadPoolExecutor(1) as pool:
        with server_here(model) as live:
            before = httpx.get(f"{live.url}/health").json()["tokens"]
            asked = pool.submit(httpx.post, f"{live.url}/v1/rollouts", json=body, timeout=60)
            # A request of which nothing has been sampled ends with an error instead.
            until(lambda: httpx.get(f"{live.url}/health").json()["tokens"] > before)
        reply = asked.result()
    rows = reply.json()["rollouts"]
    assert reply.status_code == 200 and reply.json()["complete"] is False
    assert len(rows) == 48 and any(row["token_ids"] for row in rows)
    assert {(row["finish_reason"], row["stop_reason"]) for row in rows} == {("aborted", "stopping")}


def bad_uploads(model: Path) -> dict[str, tuple[bytes, str, int]]:
    """Name → (body, what the sentence must mention, status)."""
    tensors, config = adapter(model, 7)
    metadata = {"adapter_config": json.dumps(config)}
    good = save(tensors, metadata)
    names = sorted(tensors)
    layer = {name: tensors[name] for name in names[: len(names) // 2]}
    half = {name: tensors[name] for name in names[: len(names) // 2 - 1]}
    shaped = {**tensors, names[0]: np.zeros((4, 3), np.float32)}
    broken = {**tensors, names[0]: np.full_like(tensors[names[0]], np.nan)}
    return {
        "truncated": (good[: len(good) // 2], "safetensors", 422),
        "wrong shape": (save(shaped, metadata), names[0].split(".lora")[0].removeprefix("base_model.model."), 422),
        "a layer of two": (save(layer, metadata), "the file has no tensors for them", 422),
        "half of a pair": (save(half, metadata), "missing", 422),
        "nan": (save(broken, metadata), names[0].split(".lora")[0].removeprefix("base_model.model."), 422),
        "pickle": (
            b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
            "safetensors",
            422,
        ),
        "2 GB header": (struct.pack("<Q", 2**31) + b"{}", "safetensors", 422),
        "no config": (save(tensors), "adapter_config", 422),
        "empty": (b"", "", 422),
    }


def test_bad_uploads_get_their_sentence_and_change_nothing(server: Server, client: RolloutClient, model: Path) -> None:
    good = client.push("kept", *adapter(model, 3))
    before = sample(client, "kept")
    for name, (body, mention, status) in bad_uploads(model).items():
        reply = httpx.post(
            f"{server.url}/v1/weights",
            params={"name": "kept"},
            content=body,
            headers={"content-type": "application/octet-stream"},
        )
        assert 400 <= reply.status_code < 500, (name, reply.text)
        assert reply.status_code == status or name == "empty", (name, reply.text)
        error = reply.json()["error"]
        assert mention in error["message"] and error["retryable"] is False, (name, error)
        line = client.policy("kept")
        assert (line.live, [v.digest for v in line.versions]) == (1, [good.digest])
    assert_drawn_again(sample(client, "kept"), before)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "unknown policy": ({"policy": "nobody"}, 404, None),
    "unknown version": ({"policy": "base@3"}, 404, None),
    "unknown field": ({"polcy": "base"}, 400, "polcy"),
    "empty prompt": ({"prompts": [{"token_ids": []}]}, 400, None),
    "no prompt": ({"prompts": []}, 400, None),
    "id too large": ({"prompts": [{"token_ids": [1, 99999]}]}, 400, None),
    "negative id": ({"prompts": [{"token_ids": [-1]}]}, 400, None),
    "longer than the context": ({"prompts": [{"token_ids": [1] * 3000}]}, 400, None),
    "negative temperature": ({"sampling": {"temperature": -1}}, 400, "sampling.temperature"),
    "absurd top_p": ({"sampling": {"top_p": 7}}, 400, "sampling.top_p"),
    "zero tokens": ({"sampling": {"max_tokens": 0}}, 400, "sampling.max_tokens"),
    "text for a number": ({"n": "8"}, 400, "n"),
    "too many rows": ({"n": 10**9}, 400, None),
    "min_version ahead": ({"policy": "steady", "min_version": 99}, 409, "min_version"),
}


@pytest.mark.parametrize("name", list(BAD_REQUESTS))
def test_bad_requests_get_a_4xx_that_names_the_field(
    name: str, server: Server, client: RolloutClient, model: Path
) -> None:
    client.push("steady", *adapter(model, 3))
    change, status, param = BAD_REQUESTS[name]
    body = {"policy": "base", "prompts": [{"token_ids": [1, 2, 3]}], "sampling": {"max_tokens": 4}} | change
    reply = httpx.post(f"{server.url}/v1/rollouts", json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["message"].endswith((".", ")")) and len(error["message"]) > 10
    if param:
        assert error["param"] == param
    assert reply.headers["x-should-retry"] == str(error["retryable"]).lower()
    assert len(sample(client, "base")) == 6


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b'{"policy": "base", ', "application/json", 400),
        (b"[1, 2", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"policy=base", "text/plain", 415),
        (b"[" * 100_000, "application/json", 400),
    ],
)
def test_broken_bodies(body: bytes, kind: str, status: int, server: Server) -> None:
    reply = httpx.post(f"{server.url}/v1/rollouts", content=body, headers={"content-type": kind})
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"]


def test_a_body_over_the_limit_is_413(narrow: Server) -> None:
    big = {"policy": "base", "prompts": [{"token_ids": [1] * 100_000}]}
    reply = httpx.post(f"{narrow.url}/v1/rollouts", json=big)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"
    reply = httpx.post(
        f"{narrow.url}/v1/weights",
        params={"name": "big"},
        content=bytes(300_000),
        headers={"content-type": "application/octet-stream"},
    )
    assert reply.status_code == 413
    with RolloutClient(narrow.url) as client:
        assert client.weights() == [] or not list(client.weights())
        assert len(client.rollouts(PROMPTS, policy="base", max_tokens=12)) == 3


def test_a_nan_row_is_an_error_by_name_and_the_server_goes_on(client: RolloutClient, model: Path) -> None:
    client.push("wild", *adapter(model, 5, strength=1e25))
    with pytest.raises(ServerError) as caught:
        sample(client, "wild")
    assert caught.value.code == "non_finite_logits" and caught.value.status == 500
    assert len(sample(client, "base")) == 6
