"""`POST /v1/rollouts`: what it sends to the engine and what it makes of the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.errors import EngineFault, NonFiniteLogits, QueueFull
from rollout_server.rollout import FinishReason, PolicyAddress, RolloutRequest, row_seed
from rollout_server.schemas.rollouts import RolloutsReply
from tests.support.http.fake_engine import CONTEXT, FakeEngine, Row, base_logprob, logprob, sampling_logprob
from tests.support.http.fake_versions import BASE_DIGEST

Client = TestClient[Any]


def ask(client: Client, prompts: list[dict[str, Any]] | None = None, **fields: Any) -> Any:
    body = {"policy": "base", "prompts": prompts or [{"token_ids": [1, 2, 3]}], **fields}
    return client.post("/v1/rollouts", json=body)


def groups(engine: FakeEngine) -> tuple[RolloutRequest, ...]:
    return engine.submitted[-1][1]


def test_a_reply_has_every_field_of_the_contract(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 3)
    response = ask(
        client,
        [{"token_ids": [9, 8], "id": "first"}, {"token_ids": [7]}],
        policy="policy",
        id="mine-1",
        n=2,
        sampling={"max_tokens": 5, "temperature": 0.5, "seed": 7, "stop": "!"},
    )
    assert response.status_code == 200
    body = response.json()
    reply = RolloutsReply.model_validate(body)
    assert set(body) == set(RolloutsReply.model_fields)
    assert (reply.id, reply.complete) == ("mine-1", True)
    live = engine.live("policy")
    assert live is not None
    assert body["policy"] == {"name": "policy", "version": 3, "digest": live.digest}
    assert body["base"] == {"id": "org/tiny", "digest": BASE_DIGEST}
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 12,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert [(row.prompt_index, row.sample_index) for row in reply.rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    row = body["rollouts"][1]
    ids = row["token_ids"]
    assert (row["prompt_id"], row["prompt_token_ids"]) == ("first", [9, 8])
    assert row["loss_mask"] == [1, 1, 1]
    assert row["logprobs"] == [logprob(id) for id in ids]
    assert row["versions"] == [
        {"policy": "policy", "version": 3, "digest": live.digest, "label": "step-3", "start": 0, "end": 3}
    ]
    assert row["seed"] == row_seed(7, 0, 1)
    assert row["sampling"]["stop"] == ["!"] and row["sampling"]["max_tokens"] == 5
    assert row["timings_ms"] == {"queued": 1.0, "prefill": 2.0, "decode": 3.0}
    assert len({row.id for row in reply.rollouts}) == 4


def test_arrays_come_only_when_asked_for(client: Client, engine: FakeEngine) -> None:
    optional = ("sampling_logprobs", "log_kept_mass", "entropy", "prompt_logprobs", "top_logprobs", "text")
    row = ask(client).json()["rollouts"][0]
    assert [row[name] for name in (*optional, "base_logprobs")] == [None] * 7
    returns = ["text", "sampling_logprobs", "entropy", "prompt_logprobs"]
    assert ask(client, **{"return": ["base_logprobs"]}).json()["rollouts"][0]["base_logprobs"] == [
        base_logprob(id) for id in row["token_ids"]
    ]
    row = ask(client, **{"return": returns, "top_logprobs": 2}).json()["rollouts"][0]
    ids = row["token_ids"]
    assert row["sampling_logprobs"] == [sampling_logprob(id) for id in ids]
    assert row["log_kept_mass"] == [0.0] * 3
    assert row["entropy"] == [0.5] * 3
    assert row["prompt_logprobs"] == [None, logprob(2), logprob(3)]
    assert row["top_logprobs"][0] == [[ids[0], logprob(ids[0])], [ids[0] + 1, logprob(ids[0]) - 1]]
    assert row["text"] == engine.tokenizer.decode(ids)
    assert row["base_logprobs"] is None


def test_nan_is_null(client: Client) -> None:
    row = ask(client, sampling={"temperature": 0}, **{"return": ["sampling_logprobs"]}).json()["rollouts"][0]
    assert row["log_kept_mass"] == [None] * 3


def test_row_seeds_follow_the_contract(client: Client, engine: FakeEngine) -> None:
    ask(client, [{"token_ids": [1]}, {"token_ids": [1], "seed": 99}, {"token_ids": [1]}], n=2, sampling={"seed": 5})
    first, own, third = (group.seeds for group in groups(engine))
    assert first == (5, row_seed(5, 0, 1))
    assert own == (99, row_seed(99, 0, 1))
    assert third == (row_seed(5, 2, 0), row_seed(5, 2, 1))


def test_without_a_seed_every_request_differs(client: Client, engine: FakeEngine) -> None:
    ask(client)
    one = groups(engine)[0].seeds
    ask(client)
    assert groups(engine)[0].seeds != one


def test_prompts_may_have_their_own_n_and_max_tokens(client: Client, engine: FakeEngine) -> None:
    ask(client, [{"token_ids": [1], "n": 3, "max_tokens": 4}, {"token_ids": [1, 2]}], n=2, sampling={"max_tokens": 9})
    assert [(group.n, group.sampling.max_tokens) for group in groups(engine)] == [(3, 4), (2, 9)]


def test_max_tokens_is_what_fits_if_absent(client: Client, engine: FakeEngine) -> None:
    ask(client, [{"token_ids": [1] * 100}])
    assert groups(engine)[0].sampling.max_tokens == CONTEXT - 100


@pytest.mark.parametrize("special", [True, False])
def test_text_is_encoded_as_transformers_does(client: Client, engine: FakeEngine, special: bool) -> None:
    text = "the cat <|user|> 你好😀"
    ask(client, [{"text": text, "add_special_tokens": special}])
    assert list(groups(engine)[0].prompt_ids) == engine.tokenizer.encode(text, add_special_tokens=special)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"shout": True}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    ],
)
def test_messages_are_rendered_as_transformers_does(
    client: Client, engine: FakeEngine, options: dict[str, Any]
) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2="}]
    if "continue_final_message" in options:
        messages.append({"role": "assistant", "content": "it is"})
    assert ask(client, [{"messages": messages, **options}]).status_code == 200
    given = {name: value for name, value in options.items() if name != "chat_template_kwargs"}
    wants = "add_generation_prompt" not in options and "continue_final_message" not in options
    expected = engine.tokenizer.apply_chat_template(
        messages,
        return_dict=False,
        **({"add_generation_prompt": wants} | given | options.get("chat_template_kwargs", {})),
    )
    assert list(groups(engine)[0].prompt_ids) == expected


def test_what_the_template_refuses_is_a_bad_field(client: Client, problem: Callable[..., Any]) -> None:
    response = ask(client, [{"token_ids": [1]}, {"messages": [{"role": "forbidden", "content": "x"}]}])
    error = problem(response, 400, "invalid_field", "prompts[1].messages")
    assert "no such role" in error["message"]


def test_policies_are_addressed_by_name_version_and_digest(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    digest = engine.find("policy", 1).digest
    for text, address in {
        "base": PolicyAddress("base"),
        "base@0": PolicyAddress("base"),
        "org/tiny": PolicyAddress("base"),
        f"base@{BASE_DIGEST[:20]}": PolicyAddress("base"),
        "policy": PolicyAddress("policy"),
        "policy@1": PolicyAddress("policy", number=1),
        f"policy@{digest[:17]}": PolicyAddress("policy", digest=digest[:17]),
    }.items():
        assert ask(client, policy=text).status_code == 200
        assert groups(engine)[0].policy == address
    # the alias when the reply was made, whatever version was asked for
    assert ask(client, policy="policy@1").json()["policy"]["version"] == 2


def test_an_unknown_policy_is_404_and_a_freed_one_409(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    problem(ask(client, policy="nobody"), 404, "unknown_policy")
    problem(ask(client, policy="base@1"), 404, "unknown_policy", "policy")
    engine.add("policy", 3)
    engine.free("policy", 1)
    error = problem(ask(client, policy="policy@1"), 409, "version_gone")
    # the alias is another version than the one that was asked for
    assert "version" not in error
    problem(ask(client, policy="not a name"), 404, "unknown_policy", "policy")


def test_min_version_is_passed_on_and_its_refusal_is_409(
    client: Client, engine: FakeEngine, problem: Callable[..., Any]
) -> None:
    engine.add("policy", 2)
    error = problem(ask(client, policy="policy", min_version=3, wait_s=0.5), 409, "stale_policy")
    assert engine.submitted[-1][1][0].wait_s == 0.5
    assert error["retryable"] and error["version"] == 2
    # the same when the reply would have been a stream
    problem(ask(client, policy="policy", min_version=3, stream=True), 409, "stale_policy")


def test_timeout_becomes_a_deadline(client: Client, engine: FakeEngine) -> None:
    before = time.monotonic()
    ask(client, timeout_s=2.5)
    assert before + 2.5 <= engine.submitted[-1][2] <= time.monotonic() + 2.5
    ask(client)
    assert engine.submitted[-1][2] is None


def test_the_id_comes_from_body_or_header(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    body = {"policy": "base", "prompts": [{"token_ids": [1]}]}
    assert client.post("/v1/rollouts", json=body, headers={"x-request-id": "h-1"}).json()["id"] == "h-1"
    assert client.post("/v1/rollouts", json=body | {"id": "b-1"}).json()["id"] == "b-1"
    fresh = [client.post("/v1/rollouts", json=body).json()["id"] for _ in range(2)]
    assert fresh[0] != fresh[1]
    both = client.post("/v1/rollouts", json=body | {"id": "b-1"}, headers={"x-request-id": "h-1"})
    problem(both, 400, "invalid_field", "id")
    problem(client.post("/v1/rollouts", json=body | {"id": "/engine/1"}), 400, "invalid_field", "id")
    problem(
        client.post("/v1/rollouts", json=body, headers={"x-request-id": "a b"}), 400, "invalid_field", "X-Request-Id"
    )


def test_a_stream_has_a_line_per_rollout_and_a_last_one(client: Client) -> None:
    whole = ask(client, n=3, id="a", **{"return": ["text"]}).json()
    response = ask(client, n=3, id="a", stream=True, sampling={"seed": 1}, **{"return": ["text"]})
    assert response.headers["content-type"].startswith("application/x-ndjson")
    assert response.text.endswith("\n")
    *rows, last = [json.loads(line) for line in response.text.splitlines()]
    assert last == {"done": True, "complete": True, "usage": whole["usage"]}
    for row, same in zip(rows, whole["rollouts"], strict=True):
        assert row | {"seed": 0} == same | {"seed": 0}


def test_rows_that_failed_stand_beside_those_that_did_not(client: Client, engine: FakeEngine) -> None:
    def script(request: RolloutRequest, sample: int) -> Row:
        return Row([60]) if sample == 0 else Row([], error=NonFiniteLogits("The model produced NaN."))

    engine.script = script
    body = ask(client, n=2).json()
    assert body["complete"] is False
    good, bad = body["rollouts"]
    assert (good["finish_reason"], good["error"]) == ("length", None)
    assert bad["finish_reason"] == "error"
    assert bad["error"] == {"code": "non_finite_logits", "message": "The model produced NaN."}
    assert (bad["versions"], bad["token_ids"]) == ([], [])


@pytest.mark.parametrize("stream", [False, True])
def test_if_nothing_ran_the_request_fails(
    client: Client, engine: FakeEngine, stream: bool, problem: Callable[..., Any]
) -> None:
    engine.script = lambda request, sample: Row([], error=NonFiniteLogits("The model produced NaN."))
    error = problem(ask(client, n=2, stream=stream), 500, "non_finite_logits")
    assert error["retryable"] is False


def test_an_engine_that_dies_half_way_loses_no_finished_row(client: Client, engine: FakeEngine) -> None:
    def script(request: RolloutRequest, sample: int) -> Row:
        if sample == 1:
            raise EngineFault("The step failed.")
        return Row([60, 61])

    engine.script = script
    body = ask(client, n=3).json()
    assert [row["finish_reason"] for row in body["rollouts"]] == ["length", "error", "error"]
    assert body["rollouts"][2]["error"]["code"] == "engine_fault"
    assert body["complete"] is False
    *rows, last = [json.loads(line) for line in ask(client, n=3, stream=True).text.splitlines()]
    assert len(rows) == 1 and last["error"]["code"] == "engine_fault" and last["error"]["retryable"] is True


def test_a_full_queue_says_when_to_come_back(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.refusal = QueueFull("4096 requests are waiting.", retry_after_s=3.4)
    response = ask(client)
    assert problem(response, 429, "queue_full")["retryable"] is True
    assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (("the cat", FinishReason.LENGTH, None), "the cat"),
        (("the cat and", FinishReason.STOP, "cat"), "the "),
        # the string that ended the row, not one from before min_tokens
        (("cat a cat", FinishReason.STOP, "cat"), "cat a "),
        (("the 你好", FinishReason.STOP, "好"), "the 你"),
    ],
)
def test_text_is_cut_before_the_stop_string(client: Client, engine: FakeEngine, row: Any, text: str) -> None:
    written, reason, stop = row
    ids = engine.tokenizer.encode(written)
    if stop is not None:
        # up to the token that completes the last occurrence
        while stop in engine.tokenizer.decode(ids[:-1])[len(text) :]:
            ids = ids[:-1]
    engine.script = lambda request, sample: Row(ids, reason, stop)
    entry = ask(client, **{"return": ["text"]}).json()["rollouts"][0]
    assert entry["text"] == text
    assert entry["token_ids"] == ids
    assert entry["stop_reason"] == stop


def test_an_end_token_has_no_text(client: Client, engine: FakeEngine) -> None:
    """Special or not: a stop token id is an end too."""
    ids = engine.tokenizer.encode("hat")
    for end in (engine.tokenizer.eos_token_id, engine.tokenizer.encode("!")[0]):
        engine.script = lambda request, sample, end=end: Row([*ids, end], FinishReason.STOP, end)  # type: ignore[misc]
        entry = ask(client, **{"return": ["text"]}).json()["rollouts"][0]
        assert (entry["text"], entry["stop_reason"]) == ("hat", end)
        assert entry["token_ids"][-1] == end
