"""`POST /v1/logprobs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from litestar.testing import TestClient

from rollout_server.errors import NonFiniteLogits
from rollout_server.rollout import PolicyAddress
from rollout_server.schemas.logprobs import LogprobsReply
from tests.http.fake_engine import FakeEngine, logprob, top_of

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
