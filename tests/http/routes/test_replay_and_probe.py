"""`POST /v1/replay` and `POST /v1/probe`: what reaches the engine, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from rollout_server.rollout import PolicyAddress, SpanAddress
from rollout_server.schemas.replay_and_probe import ProbeReply, RecordedRollout, ReplayReply
from rollout_server.schemas.rollouts import RolloutReply
from tests.http.bad_input.routes import JSON_ROUTES
from tests.support.http.fake_engine import FakeEngine, logprob

Client = TestClient[Any]


def sampled(client: Client, **options: Any) -> list[dict[str, Any]]:
    body = {
        "policy": "policy@1",
        "prompts": [{"token_ids": [1, 2]}, {"token_ids": [3]}],
        "return": ["sampling_logprobs"],
    }
    response = client.post("/v1/rollouts", json=body | options)
    assert response.status_code == 200, response.text
    return list(response.json()["rollouts"])


def test_every_field_of_a_rollout_may_be_sent_back() -> None:
    # A reply has no pictures: they are the trainer's.
    assert RolloutReply.model_fields.keys() | {"images"} == RecordedRollout.model_fields.keys()


def test_rollouts_are_replayed_as_they_came(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 1)
    rows = sampled(client, sampling={"seed": 4, "max_tokens": 3, "stop": ["x"], "logit_bias": {"7": 1.5}})
    response = client.post("/v1/replay", json={"rollouts": rows})
    assert response.status_code == 200, response.text
    reply = response.json()
    ReplayReply.model_validate(reply)
    differs = {"exact": False, "first_difference": 1, "margin": 0.25, "max_abs_logprob_difference": 0.5}
    assert reply["rollouts"] == [differs, differs] and reply["instance"]
    digest = engine.find("policy", 1).digest
    for row, given, group in zip(engine.replayed, rows, engine.submitted[-1][1], strict=True):
        assert (row.prompt_ids, row.sampling, (row.seed,)) == (group.prompt_ids, group.sampling, group.seeds)
        assert row.token_ids == tuple(given["token_ids"]) and row.judged == (True,) * 3
        assert row.logprobs == tuple(given["logprobs"])
        assert row.spans == (SpanAddress(PolicyAddress("policy", 1), 0, 3, digest),)


NOBODY = {"policy": None, "version": None, "digest": None, "label": None}
BASE = {"policy": "base", "version": 0}
ONE = {"policy": "policy", "version": 1, "label": None}


@pytest.mark.parametrize(
    ("mask", "versions", "read"),
    [
        ([0, 0, 1], [NOBODY | {"start": 0, "end": 2}, ONE | {"start": 2, "end": 3}], [(0, 3)]),
        (
            [0, 1, 0],
            [NOBODY | {"start": 0, "end": 1}, ONE | {"start": 1, "end": 2}, NOBODY | {"start": 2, "end": 3}],
            [(0, 3)],
        ),
        ([0, 0, 0], [NOBODY | {"start": 0, "end": 3}], []),
        ([0, 0, 0], [], []),
    ],
    ids=str,
)
def test_given_text_is_read_under_the_span_beside_it(
    client: Client, engine: FakeEngine, mask: Any, versions: Any, read: Any
) -> None:
    engine.add("policy", 1)
    (row, _) = sampled(client)
    changed = row | {"loss_mask": mask, "versions": versions}
    assert client.post("/v1/replay", json={"rollouts": [changed]}).status_code == 200
    assert [(span.start, span.end) for span in engine.replayed[-1].spans] == read
    assert engine.replayed[-1].judged == tuple(map(bool, mask))
    probed = client.post("/v1/probe", json={"rollouts": [changed | {"trainer_logprobs": [-1.0] * 3}]})
    assert probed.status_code == 200, probed.text
    assert sum(entry["tokens"] for entry in probed.json()["versions"]) == sum(mask)


def formulas(d: np.ndarray) -> dict[str, float]:
    """The contract's, in float64."""
    w = np.exp(d)
    return {
        "tokens": len(d),
        "kl": np.mean(w - 1 - d),
        "mean_ratio": np.mean(w),
        "max_ratio": np.max(w),
        "ess": np.sum(w) ** 2 / (len(d) * np.sum(w**2)),
        "max_abs_difference": np.max(np.abs(d)),
    }


def close(found: dict[str, Any], expected: dict[str, float]) -> None:
    assert found == {name: pytest.approx(value, rel=1e-12, abs=1e-15) for name, value in expected.items()}


def test_a_probe_compares_with_what_was_recorded_and_with_a_pass_now(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    first, second = sampled(client)
    other = sampled(client, policy="policy@2")[0]
    trainer = [[-0.5, None, -0.25], [-0.7, -0.8, -0.9], [-1.0, -2.0, -3.0]]
    rows = [row | {"trainer_logprobs": own} for row, own in zip((first, second, other), trainer, strict=True)]
    rows[1] |= {"loss_mask": [0, 1, 1], "logprobs": [None, -0.75, None]}
    response = client.post("/v1/probe", json={"rollouts": rows})
    assert response.status_code == 200, response.text
    reply = response.json()
    ProbeReply.model_validate(reply)
    assert [(entry["version"], entry["tokens"]) for entry in reply["versions"]] == [(1, 4), (2, 3)]
    one, two = first["token_ids"], second["token_ids"]
    now = np.array([-0.5 - logprob(one[0]), -0.25 - logprob(one[2]), -0.8 - logprob(two[1]), -0.9 - logprob(two[2])])
    then = np.array([-0.5 - first["logprobs"][0], -0.25 - first["logprobs"][2], -0.8 + 0.75])
    close(reply["versions"][0]["rescored"], formulas(now))
    close(reply["versions"][0]["recorded"], formulas(then))
    close(reply["versions"][1]["recorded"], formulas(np.array(trainer[2]) - np.array(other["logprobs"])))
    asked = engine.scored[-1]
    assert asked.by_digest and asked.starts == (2, 1, 2) and asked.temperature == 1.0


def test_at_another_temperature_the_tempered_values_count(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 1)
    rows = sampled(client, sampling={"temperature": 0.5}) + sampled(client)
    body = {"rollouts": [row | {"trainer_logprobs": [-1.0] * 3} for row in rows], "temperature": 0.5}
    (entry,) = client.post("/v1/probe", json=body).json()["versions"]
    assert engine.scored[-1].temperature == 0.5
    tempered = [
        -1.0 - a - b for row in rows[:2] for a, b in zip(row["sampling_logprobs"], row["log_kept_mass"], strict=True)
    ]
    close(entry["recorded"], formulas(np.array(tempered)))
    assert entry["tokens"] == entry["rescored"]["tokens"] == 12
    bare = [row | {"sampling_logprobs": None, "log_kept_mass": None} for row in body["rollouts"]]
    (entry,) = client.post("/v1/probe", json=body | {"rollouts": bare}).json()["versions"]
    assert entry["recorded"] is None


def test_values_too_large_for_a_number_are_null(client: Client, engine: FakeEngine) -> None:
    (row,) = JSON_ROUTES["/v1/probe"]["rollouts"]
    body = {"rollouts": [row | {"trainer_logprobs": [2000.0, -1.0]}]}
    (entry,) = client.post("/v1/probe", json=body).json()["versions"]
    assert entry["rescored"]["kl"] is entry["rescored"]["max_ratio"] is None
    assert entry["rescored"]["ess"] == 0.5 and math.isclose(entry["recorded"]["max_abs_difference"], 2001.0)


def test_an_unchanged_rollout_is_no_probe(client: Client, engine: FakeEngine, problem: Callable[..., Any]) -> None:
    engine.add("policy", 1)
    response = client.post("/v1/probe", json={"rollouts": sampled(client)})
    error = problem(response, 400, "invalid_field", "rollouts[0].trainer_logprobs")
    assert "rollouts[0].trainer_logprobs is required" in error["message"]


@pytest.mark.parametrize("route", ["/v1/replay", "/v1/probe"])
@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"loss_mask": [1]}, 400, "invalid_field", "loss_mask"),
        ({"loss_mask": [1, 2]}, 400, "invalid_field", "loss_mask[1]"),
        ({"logprobs": [-1.0]}, 400, "invalid_field", "logprobs"),
        ({"token_ids": [3, 400]}, 400, "invalid_field", "token_ids[1]"),
        ({"prompt_token_ids": []}, 400, "invalid_field", "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 512}, 400, "context_length_exceeded", "token_ids"),
        ({"versions": None}, 400, "invalid_field", "versions"),
        ({"versions": []}, 400, "invalid_field", "versions"),
        ({"versions": [BASE | {"start": 0, "end": 1}]}, 400, "invalid_field", "versions"),
        ({"versions": [NOBODY | {"start": 0, "end": 2}]}, 404, "unknown_policy", "versions[0].policy"),
        ({"versions": [BASE | {"start": 0, "end": 2, "kv": "carried"}]}, 400, "invalid_field", "versions"),
        ({"rewards": 1}, 400, "invalid_field", "rewards"),
    ],
    ids=str,
)
def test_what_is_no_rollout_is_refused(
    route: str, changes: Any, status: int, code: str, param: str, client: Client, problem: Callable[..., Any]
) -> None:
    (row,) = JSON_ROUTES[route]["rollouts"]
    problem(client.post(route, json={"rollouts": [row | changes]}), status, code, f"rollouts[0].{param}")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"seed": None}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"sampling": None}, "sampling"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"stop_token_ids": [400]}}, "sampling.stop_token_ids[0]"),
        ({"sampling": {"logit_bias": {"400": 1}}}, "sampling.logit_bias.400"),
        ({"trainer_logprobs": [0.0, 0.0]}, "trainer_logprobs"),
    ],
    ids=str,
)
def test_a_replay_needs_seed_and_sampling(
    changes: Any, param: str, client: Client, problem: Callable[..., Any]
) -> None:
    (row,) = JSON_ROUTES["/v1/replay"]["rollouts"]
    problem(client.post("/v1/replay", json={"rollouts": [row | changes]}), 400, "invalid_field", f"rollouts[0].{param}")
