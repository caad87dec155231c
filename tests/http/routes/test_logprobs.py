"""`POST /v1/logprobs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.errors import NonFiniteLogits
from rollout_server.rollout import PolicyAddress, SpanAddress
from rollout_server.schemas.logprobs import LogprobsReply
from tests.support.http.fake_engine import FakeEngine, logprob, top_of
from tests.support.http.fake_versions import BASE_DIGEST

Client = TestClient[Any]


def test_values_stand_for_positions_from_start(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    body = {"policy": "policy@1", "sequences": [{"token_ids": [5, 6, 7]}, {"token_ids": [8, 9, 10, 11], "start": 2}]}
    response = client.post("/v1/logprobs", json=body)
    assert response.status_code == 200
    reply = response.json()
    LogprobsReply.model_validate(reply)
    assert [sequence["logprobs"] for sequence in reply["sequences"]] == [
        [None, logprob(6), logprob(7)],
        [logprob(10), logprob(11)],
    ]
    assert all(sequence["entropy"] is None and sequence["top_logprobs"] is None for sequence in reply["sequences"])
    # the alias now, and the version that scored
    assert reply["policy"]["version"] == 2
    first = engine.find("policy", 1)
    assert reply["versions"] == [{"policy": "policy", "version": 1, "digest": first.digest, "label": "step-1"}]
    assert engine.scored[-1].policy == PolicyAddress("policy", number=1)


def test_extras_and_temperature(client: Client, engine: FakeEngine) -> None:
    body = {
        "policy": "base",
        "sequences": [{"token_ids": [5, 6]}],
        "temperature": 0.5,
        "return": ["entropy"],
        "top_logprobs": 2,
    }
    reply = client.post("/v1/logprobs", json=body).json()
    (sequence,) = reply["sequences"]
    assert sequence["entropy"] == [None, 0.5]
    assert sequence["top_logprobs"] == [None, [list(pair) for pair in top_of(6, 2)]]
    assert reply["temperature"] == engine.scored[-1].temperature == 0.5


def test_an_engine_s_refusal_is_passed_on(
    client: Client, engine: FakeEngine, problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.fault = NonFiniteLogits("The model produced NaN.")
    response = client.post("/v1/logprobs", json={"policy": "base", "sequences": [{"token_ids": [1, 2]}]})
    problem(response, 500, "non_finite_logits")


def scored(client: Client, versions: Any, **sequence: Any) -> Any:
    body = {"policy": "base", "sequences": [{"token_ids": [5, 6, 7, 8], "start": 1, "versions": versions, **sequence}]}
    return client.post("/v1/logprobs", json=body)


def test_spans_say_under_what_a_sequence_is_read(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    one, two = (engine.find("policy", number) for number in (1, 2))
    versions = [
        {"policy": "policy", "version": 1, "digest": one.digest, "label": "step-1", "start": 0, "end": 2},
        {"policy": "policy", "digest": two.digest, "start": 2, "end": 3, "kv": "carried"},
    ]
    response = scored(client, versions)
    assert response.status_code == 200, response.text
    reply = response.json()
    LogprobsReply.model_validate(reply)
    (sequence,) = reply["sequences"]
    assert sequence["versions"] == [versions[0], versions[1] | {"version": 2, "label": "step-2"}]
    assert [entry["version"] for entry in reply["versions"]] == [1, 2]
    assert engine.scored[-1].spans == (
        (
            SpanAddress(PolicyAddress("policy", number=1), 0, 2, one.digest),
            SpanAddress(PolicyAddress("policy", digest=two.digest), 2, 3, two.digest, "carried"),
        ),
    )


def test_spans_on_the_base_and_sequences_without(client: Client, engine: FakeEngine) -> None:
    base = {"policy": "base", "version": 0, "digest": BASE_DIGEST, "label": None, "start": 0, "end": 3}
    reply = scored(client, [base]).json()
    assert reply["sequences"][0]["versions"] == [base] == scored(client, None).json()["sequences"][0]["versions"]
    assert engine.scored[-1].spans == (None,)


@pytest.mark.parametrize(
    ("versions", "status", "code", "param"),
    [
        ([], 400, "invalid_field", "sequences[0].versions"),
        ([{"policy": "p", "version": 1, "start": 0, "end": 2}], 400, "invalid_field", "sequences[0].versions"),
        ([{"policy": "p", "version": 1, "start": 0, "end": 4}], 400, "invalid_field", "sequences[0].versions"),
        ([{"policy": "p", "version": 1, "start": 1, "end": 3}], 400, "invalid_field", "sequences[0].versions"),
        (
            [{"policy": "p", "version": 1, "start": 0, "end": 3, "kv": "carried"}],
            400,
            "invalid_field",
            "sequences[0].versions",
        ),
        (
            [{"policy": "p", "version": 1, "start": 0, "end": 3, "kv": "fresh"}],
            400,
            "invalid_field",
            "sequences[0].versions[0].kv",
        ),
        ([{"policy": "p", "start": 0, "end": 3}], 400, "invalid_field", "sequences[0].versions[0].version"),
        (
            [{"policy": "p", "digest": "sha256:12", "start": 0, "end": 3}],
            400,
            "invalid_field",
            "sequences[0].versions[0].digest",
        ),
        ([{"policy": "p", "version": 1, "start": 0}], 400, "invalid_field", "sequences[0].versions[0].end"),
        (
            [{"policy": None, "version": None, "digest": None, "label": None, "start": 0, "end": 3}],
            404,
            "unknown_policy",
            "sequences[0].versions[0].policy",
        ),
        (
            [{"policy": "no name", "version": 1, "start": 0, "end": 3}],
            404,
            "unknown_policy",
            "sequences[0].versions[0].policy",
        ),
        (
            [{"policy": "base", "version": 3, "start": 0, "end": 3}],
            404,
            "unknown_policy",
            "sequences[0].versions[0].policy",
        ),
    ],
    ids=str,
)
def test_spans_that_say_nothing_are_refused(
    client: Client, versions: Any, status: int, code: str, param: str, problem: Callable[..., Any]
) -> None:
    problem(scored(client, versions), status, code, param)
