"""When requests are repeated, without any request: the flow is driven by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.trainer_client import contract
from trainer_client.errors import EngineUnavailable, NotFound, QueueFull, ServerUnreachable
from trainer_client.retry import Flow, Retry, Send, Sleep, sending, until_ready
from trainer_client.verbs import control, sampling
from trainer_client.wire.call import Call
from trainer_client.wire.replies import Reply

OK = contract.reply({})
FULL = contract.reply(contract.problem(retryable=True), 429, retry_after="3")
REFUSED = ServerUnreachable("refused")
LOST = ServerUnreachable("lost", sent=True)
SILENT = ServerUnreachable("silent", sent=True, timed_out=True)

ROLLOUTS, MODELS = sampling.rollouts([[1]]), control.models()


def drive(flow: Flow, *outcomes: Reply | ServerUnreachable) -> tuple[Reply, list[float]]:
    """The reply the flow returns when its requests end like this, and how long it slept before each repetition."""
    slept: list[float] = []
    left = list(outcomes)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Sleep):
                slept.append(step.seconds)
                step = next(flow)
                continue
            assert isinstance(step, Send)
            outcome = left.pop(0)
            step = flow.throw(outcome) if isinstance(outcome, ServerUnreachable) else flow.send(outcome)
    except StopIteration as done:
        assert not left
        return done.value, slept


def test_what_the_server_calls_retryable_is_repeated_not_sooner_than_it_says() -> None:
    reply, slept = drive(sending(ROLLOUTS, Retry()), FULL, FULL, OK)
    assert reply is OK
    assert len(slept) == 2
    assert all(3.0 <= seconds <= 3.25 for seconds in slept)


def test_without_a_hint_the_wait_doubles_up_to_a_bound() -> None:
    retry = Retry(attempts=9, first_delay_s=0.5, longest_delay_s=4.0)
    busy = contract.reply(contract.problem("never_admitted", retryable=True), 408)
    _, slept = drive(sending(ROLLOUTS, retry), *[busy] * 6, OK)
    for seconds, longest in zip(slept, [0.5, 1, 2, 4, 4, 4], strict=True):
        assert longest / 2 <= seconds <= longest


def test_attempts_are_bounded_and_the_last_error_is_raised() -> None:
    flow = sending(ROLLOUTS, Retry(attempts=3))
    with pytest.raises(QueueFull) as caught:
        drive(flow, FULL, FULL, FULL)
    assert caught.value.retry_after_s == 3
    with pytest.raises(QueueFull):
        drive(sending(ROLLOUTS, Retry(attempts=1)), FULL)


def test_a_server_that_asks_for_too_long_is_not_waited_for() -> None:
    with pytest.raises(QueueFull):
        drive(sending(ROLLOUTS, Retry(longest_delay_s=2.0)), FULL)


@pytest.mark.parametrize("call", [ROLLOUTS, MODELS])
def test_what_is_not_retryable_is_not_repeated(call: Call[Any]) -> None:
    with pytest.raises(NotFound):
        drive(sending(call, Retry()), contract.reply(contract.problem("not_found"), 404))


@pytest.mark.parametrize("unreachable", [REFUSED, LOST])
def test_a_lost_connection_repeats_only_what_may_happen_twice(unreachable: ServerUnreachable) -> None:
    reply, slept = drive(sending(MODELS, Retry()), unreachable, OK)
    assert reply is OK
    assert len(slept) == 1
    with pytest.raises(ServerUnreachable) as caught:
        drive(sending(ROLLOUTS, Retry()), unreachable)
    assert caught.value is unreachable


def test_a_reply_that_took_too_long_is_not_asked_for_again() -> None:
    with pytest.raises(ServerUnreachable, match="silent"):
        drive(sending(MODELS, Retry()), SILENT)


def test_not_ready_is_an_answer_not_an_error() -> None:
    not_ready = contract.reply(contract.problem("engine_unavailable", retryable=True), 503)
    reply, slept = drive(sending(control.ready(), Retry()), not_ready)
    assert slept == []
    assert control.ready().parse(reply) is False
    assert control.health().parse(OK) is True


def test_waiting_goes_on_while_the_server_starts() -> None:
    not_ready = contract.reply(contract.problem("engine_unavailable", retryable=True), 503)
    reply, slept = drive(until_ready(60.0), REFUSED, LOST, not_ready, OK)
    assert reply is OK
    assert len(slept) == 3


def test_waiting_ends_with_the_last_answer() -> None:
    not_ready = contract.reply(contract.problem("engine_unavailable", retryable=True), 503)
    with pytest.raises(ServerUnreachable, match=r"not ready within 0 s.*It was engine_unavailable") as caught:
        drive(until_ready(0.0), not_ready)
    assert isinstance(caught.value.__cause__, EngineUnavailable)


def test_waiting_ends_at_once_where_time_will_not_help() -> None:
    with pytest.raises(NotFound):
        drive(until_ready(60.0), contract.reply(contract.problem("not_found"), 404))
