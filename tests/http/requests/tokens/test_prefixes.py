"""`prefix`, `return_when`, and what else a prompt may have of its own, on the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient
from safetensors.numpy import load

from rollout_server.errors import EngineFault
from rollout_server.rollout import FinishReason, row_seed
from rollout_server.schemas.rollouts import RolloutsReply
from tests.support.http.fake_engine import FakeEngine, Row
from trainer_client.wire.parsing import parse_reply
from trainer_client.wire.replies import Reply

Client = TestClient[Any]
BINARY = {"accept": "application/vnd.safetensors"}
SPAN = {"policy": "old", "version": 3, "digest": "sha256:" + "c" * 64, "label": "s-3", "start": 0, "end": 2}
PREFIX = {
    "token_ids": [70, 71, 72],
    "logprobs": [-0.5, None, -1.25],
    "sampling_logprobs": [-0.25, -0.75, None],
    "loss_mask": [1, 1, 0],
    "versions": [SPAN, SPAN | {"version": 4, "start": 2, "end": 3, "kv": "carried"}],
}


def ask(client: Client, *prompts: dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"policy": "base", "prompts": [{"token_ids": [1, 2]} | prompt for prompt in prompts], **fields}
    return client.post("/v1/rollouts", json=body, headers=headers)


def test_it_comes_back_in_front(client: Client, engine: FakeEngine) -> None:
    returns = ["text", "sampling_logprobs", "entropy", "base_logprobs"]
    reply = ask(client, {"prefix": PREFIX}, {}, n=2, **{"return": returns, "top_logprobs": 2})
    assert reply.status_code == 200, reply.text
    body = reply.json()
    RolloutsReply.model_validate(body)
    row, _, plain, _ = body["rollouts"]
    assert row["prompt_token_ids"] == [1, 2]
    assert row["token_ids"][:3] == [70, 71, 72] and len(row["token_ids"]) == 6
    assert row["loss_mask"] == [1, 1, 0, 1, 1, 1]
    assert row["logprobs"][:3] == PREFIX["logprobs"]
    assert row["sampling_logprobs"][:3] == PREFIX["sampling_logprobs"]
    for name in ("log_kept_mass", "entropy", "base_logprobs", "top_logprobs"):
        assert row[name][:3] == [None] * 3 and None not in row[name][3:]
    given = [SPAN | {"kv": "recomputed"}, SPAN | {"version": 4, "start": 2, "end": 3, "kv": "recomputed"}]
    assert row["versions"][:2] == given
    assert [(span["start"], span["end"]) for span in row["versions"]] == [(0, 2), (2, 3), (3, 6)]
    assert plain["versions"][0]["start"] == 0 and plain["loss_mask"] == [1] * 3
    # the prefix counts once, as prompt
    counts = {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    assert body["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    (_, groups, _), = engine.submitted  # fmt: skip
    assert groups[0].given_ids == (1, 2, 70, 71, 72)


def test_ids_alone(client: Client) -> None:
    body = ask(client, {"prefix": {"token_ids": [70, 71]}}, **{"return": ["sampling_logprobs"]}).json()
    (row,) = body["rollouts"]
    assert row["loss_mask"] == [0, 0, 1, 1, 1]
    assert row["logprobs"][:2] == row["sampling_logprobs"][:2] == [None, None]
    nobody = {"policy": None, "version": None, "digest": None, "label": None}
    assert row["versions"][0] == nobody | {"start": 0, "end": 2, "kv": "recomputed"}
    for empty in ({"token_ids": []}, {"token_ids": [], "logprobs": [], "versions": []}):
        (row,) = ask(client, {"prefix": empty}).json()["rollouts"]
        assert row["loss_mask"] == [1] * 3 and len(row["versions"]) == 1


@pytest.mark.parametrize("prefix", [PREFIX, {"token_ids": [70, 71]}], ids=["all", "ids"])
def test_both_encodings_say_the_same(client: Client, prefix: dict[str, Any]) -> None:
    options = {"return": ["sampling_logprobs", "entropy"], "top_logprobs": 2, "sampling": {"seed": 5}}
    file = ask(client, {"prefix": prefix}, {}, headers=BINARY, **options)
    arrays = load(file.content)
    count = len(prefix["token_ids"])
    assert np.isnan(arrays["entropy"][:count]).all() and not np.isnan(arrays["entropy"][count:]).any()
    assert (arrays["top_ids"][:count] == -1).all()
    assert (arrays["span_kv"][: len(arrays["span_kv"]) - 2] == 2).all()
    if "versions" not in prefix:
        assert arrays["span_version"].tolist() == [-1, 0, 0]
    text = ask(client, {"prefix": prefix}, {}, **options)
    for one, other in zip(read(file), read(text), strict=True):
        assert one.spans == other.spans
        for name in ("token_ids", "loss_mask", "logprobs", "sampling_logprobs", "entropy", "top_ids", "top_logprobs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def read(response: Any) -> Any:
    return parse_reply(Reply(response.status_code, response.headers, response.content))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({}, "token_ids"),
        ({"token_ids": [400]}, "token_ids[0]"),
        ({"token_ids": [1, -1]}, "token_ids[1]"),
        ({"token_ids": [1], "logprobs": []}, "logprobs"),
        ({"token_ids": [1], "sampling_logprobs": [0.0, 0.0]}, "sampling_logprobs"),
        ({"token_ids": [1], "loss_mask": [1, 1]}, "loss_mask"),
        ({"token_ids": [1], "loss_mask": [2]}, "loss_mask[0]"),
        ({"token_ids": [1], "logprobs": [1e39]}, "logprobs[0]"),
        ({"token_ids": [1], "entropy": [1.0]}, "entropy"),
        ({"token_ids": [1, 2], "versions": []}, "versions"),
        ({"token_ids": [1, 2], "versions": [SPAN | {"end": 1}]}, "versions"),
        ({"token_ids": [1, 2], "versions": [SPAN | {"start": 1}]}, "versions"),
        ({"token_ids": [1, 2], "versions": [SPAN, SPAN]}, "versions"),
        ({"token_ids": [1, 2], "versions": [SPAN | {"version": 2**31}]}, "versions[0].version"),
        ({"token_ids": [1, 2], "versions": [SPAN | {"digest": "x"}]}, "versions[0].digest"),
    ],
    ids=str,
)
def test_what_is_no_prefix(client: Client, changes: Any, param: str, problem: Callable[..., Any]) -> None:
    problem(ask(client, {}, {"prefix": changes}), 400, "invalid_field", f"prompts[1].prefix.{param}")


def test_room_behind_it(client: Client, problem: Callable[..., Any]) -> None:
    prefix = {"prefix": {"token_ids": [5] * 4}}
    problem(ask(client, prefix, sampling={"max_tokens": 4}), 400, "invalid_field", "sampling.max_tokens")
    problem(ask(client, prefix | {"max_tokens": 3}), 400, "invalid_field", "prompts[0].max_tokens")
    assert ask(client, prefix, sampling={"max_tokens": 5}).status_code == 200
    full = {"prefix": {"token_ids": [5] * 510}}
    problem(ask(client, full), 400, "context_length_exceeded", "prompts[0].prefix")


def test_nothing_behind_it(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.script = lambda request, sample: Row([], FinishReason.ERROR, error=EngineFault("No luck."))
    problem(ask(client, {"prefix": PREFIX}), 500, "engine_fault")


def test_enough_of_each_prompt(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    for done, complete in ((2, True), (1, False)):
        rows = [
            [Row([60]) if k < of else Row([60], FinishReason.ABORTED, "return_when") for k in range(4)]
            for of in (2, done)
        ]
        engine.script = lambda request, sample, rows=rows: rows[request.prompt_index][sample]
        for stream in (False, True):
            reply = ask(client, {}, {"n": 4}, n=3, return_when={"finished": 2}, stream=stream)
            assert json.loads(reply.text.splitlines()[-1])["complete"] is complete
    groups = engine.submitted[0][1]
    assert [group.return_when for group in groups] == [2, 2]
    problem(ask(client, {}, {"n": 1}, n=3, return_when={"finished": 2}), 400, "invalid_field", "return_when.finished")
    for wrong, param in (({}, ".finished"), ({"finished": 0}, ".finished"), ({"finished": 1, "k": 1}, ".k")):
        problem(ask(client, {}, return_when=wrong), 400, "invalid_field", f"return_when{param}")


def test_a_prompt_has_its_own(client: Client, engine: FakeEngine) -> None:
    own = {"id": "mine", "n": 3, "max_tokens": 9, "seed": 77}
    body = ask(client, {}, own, n=2, sampling={"max_tokens": 5, "seed": 8}).json()
    assert [(row["prompt_id"], row["sample_index"]) for row in body["rollouts"]] == [
        (None, 0), (None, 1), ("mine", 0), ("mine", 1), ("mine", 2)
    ]  # fmt: skip
    assert [row["sampling"]["max_tokens"] for row in body["rollouts"]] == [5, 5, 9, 9, 9]
    assert [row["seed"] for row in body["rollouts"]] == [
        8, row_seed(8, 0, 1), 77, row_seed(77, 0, 1), row_seed(77, 0, 2)
    ]  # fmt: skip
    first, second = engine.submitted[0][1]
    assert (first.n, second.n) == (2, 3)
