"""The table of errors is complete, and every exception becomes one of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from litestar import exceptions as litestar_errors
from litestar.testing import RequestFactory, TestClient

from adapters.errors import AdapterDoesNotFit, AdapterError, AdapterUnreadable, AdapterUnsupported
from rollout_server import errors
from rollout_server.adapter_errors import from_adapters
from rollout_server.errors import RolloutError
from rollout_server.http import problems
from tests.support.http.fake_engine import FakeEngine


def every_error() -> list[type[RolloutError]]:
    return list(problems.subclasses())


def an_instance(cls: type[RolloutError]) -> RolloutError:
    return cls("What happened.", faults=["a", "b"]) if cls is errors.AdapterMismatch else cls("What happened.")  # type: ignore[call-arg]


def test_every_error_has_a_row_and_a_code_of_its_own() -> None:
    assert set(every_error()) == set(problems.TABLE)
    # Clients are not told which engine it was that ended.
    codes = [cls.code for cls in every_error() if cls is not errors.EngineEnded]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_travels_in_the_same_body(cls: type[RolloutError]) -> None:
    response = problems.to_response(RequestFactory().get("/"), an_instance(cls))
    body = json.loads(response.content)
    assert response.status_code == problems.TABLE[cls].status
    assert 400 <= response.status_code < 600
    shown = body["error"]
    assert (shown["message"], shown["code"], shown["retryable"]) == ("What happened.", cls.code, cls.retryable)
    assert response.headers["x-should-retry"] == ("true" if cls.retryable else "false")
    assert ("faults" in shown) == (cls is errors.AdapterMismatch)


def test_the_statuses_are_those_of_the_contract() -> None:
    assert {cls.code: row.status for cls, row in problems.TABLE.items()} == {
        "invalid_field": 400,
        "unsupported_field": 400,
        "context_length_exceeded": 400,
        "bad_body": 400,
        "unauthorized": 401,
        "forbidden": 403,
        "not_found": 404,
        "unknown_policy": 404,
        "method_not_allowed": 405,
        "never_admitted": 408,
        "version_gone": 409,
        "stale_policy": 409,
        "conflict": 409,
        "precondition_failed": 412,
        "body_too_large": 413,
        "unsupported_media_type": 415,
        "adapter_invalid": 422,
        "adapter_mismatch": 422,
        "queue_full": 429,
        "engine_fault": 500,
        "non_finite_logits": 500,
        "grammar_fault": 500,
        "replica_lost": 500,
        "engine_unavailable": 503,
        "weights_memory_exceeded": 507,
        "storage_failed": 507,
    }


def test_a_subclass_without_a_row_has_that_of_its_parent() -> None:
    class Peculiar(errors.InvalidField):
        code = "peculiar"

    try:
        assert problems.row_of(Peculiar("x")).status == 400
    finally:
        # Not to be found by whoever walks the tree.
        Peculiar.__bases__ = (type("Elsewhere", (Exception,), {}),)


@pytest.mark.parametrize(
    ("error", "cls"),
    [
        (AdapterUnreadable("no"), errors.AdapterInvalid),
        (AdapterUnsupported({"use_dora": "DoRA is not served."}), errors.UnsupportedField),
        (AdapterDoesNotFit(["a is missing.", "b is missing."]), errors.AdapterMismatch),
        (litestar_errors.NotFoundException(), errors.NotFound),
        (litestar_errors.MethodNotAllowedException(), errors.MethodNotAllowed),
        (litestar_errors.ClientException("x", status_code=413), errors.BodyTooLarge),
        (litestar_errors.ClientException("x", status_code=415), errors.UnsupportedMedia),
        (litestar_errors.ClientException("x"), errors.BadBody),
        (litestar_errors.ValidationException("x"), errors.BadBody),
        (litestar_errors.InternalServerException("x"), errors.EngineFault),
        (RuntimeError("a bug"), errors.EngineFault),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_strangers_become_ours(error: Exception, cls: type[RolloutError]) -> None:
    assert type(problems.as_rollout_error(error)) is cls


def test_the_adapters_errors_are_all_known() -> None:
    assert set(AdapterError.__subclasses__()) == {AdapterUnreadable, AdapterUnsupported, AdapterDoesNotFit}
    mapped = from_adapters(AdapterDoesNotFit(["a is missing.", "b is missing."]))
    assert isinstance(mapped, errors.AdapterMismatch)
    assert mapped.faults == ("a is missing.", "b is missing.")


def test_a_bug_answers_without_showing_itself(
    client: TestClient[Any], engine: FakeEngine, problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(engine, "submit", broken)
    response = client.post("/v1/rollouts", json={"policy": "base", "prompts": [{"token_ids": [1]}]})
    assert "secret" not in problem(response, 500, "engine_fault")["message"]


def test_places_are_written_as_paths() -> None:
    assert problems.place(("prompts", 0, "token_ids", 3)) == "prompts[0].token_ids[3]"
    assert problems.place(("prompt", "<id lists>", 1, 2)) == "prompt[1][2]"
    assert problems.place(("sampling", "top_p")) == "sampling.top_p"
    assert problems.place(()) == ""
