"""Rows that wait for their rewards: which come first, how long each is waited for, and what ends it. The clock and the
sleep are the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.engine.messages.scoring import Classified, Classify, ScorerHeld
from rollout_server.engine.open_requests import HeldScorer
from rollout_server.errors import EngineFault, RolloutError
from rollout_server.http.metrics import Metrics
from rollout_server.http.replies.row_rewards import Patience, Reading, RewardedRows
from rollout_server.rollout import BASE, FinishReason, PolicyVersion, Rollout, RowReward, SamplingParams, Timings
from tests.support.http.fake_engine import FakeEngine

VERSION = PolicyVersion("rm", 1, "sha256:" + "c" * 64)


def row(sample: int, reason: FinishReason = FinishReason.LENGTH) -> RowFinished:
    return RowFinished(
        "r",
        Rollout(0, sample, (1, 2), (10 + sample,), (0.0,), (0.0,), (0.0,), (), reason, None, 1, SamplingParams(4),
                Timings(0.0, 0.0, 0.0)),
    )  # fmt: skip


@dataclass
class Call:
    """One call: a test says when rows end, when scores come, and when time passes."""

    timeout_s: float | None = None
    deadline: float | None = None
    now: float = 0.0
    rows: asyncio.Queue[RowFinished | RolloutError | None] = field(default_factory=asyncio.Queue)
    asked: dict[int, asyncio.Future[float]] = field(default_factory=dict)
    """Scores by the last token of what is scored."""
    timers: list[tuple[float, asyncio.Future[None]]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    unreadable: dict[int, Exception] = field(default_factory=dict)
    """What reading a row raises, by its sample."""
    let_go: int = 0

    def __aiter__(self) -> AsyncIterator[TokensSampled | RowFinished]:
        return self

    async def __anext__(self) -> TokensSampled | RowFinished:
        event = await self.rows.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, RolloutError):
            raise event
        return event

    def abort(self, reason: str = "disconnect") -> None:
        self.aborted.append(reason)

    async def score(self, classify: Classify) -> Classified:
        token = classify.sequences[0][-1]
        self.asked[token] = asyncio.get_running_loop().create_future()
        value = await self.asked[token]
        return Classified(classify.id, VERSION, (np.array([value], "<f4").tobytes(),), (None,), "sigmoid")

    async def sleep(self, seconds: float) -> None:
        self.timers.append((self.now + seconds, asyncio.get_running_loop().create_future()))
        await self.timers[-1][1]

    async def pass_to(self, now: float) -> None:
        self.now = now
        for at, timer in self.timers:
            if at <= now and not timer.done():
                timer.set_result(None)
        await settled()

    def gone(self, _: HeldScorer) -> None:
        self.let_go += 1

    def read(self, rollout: Rollout) -> tuple[int, ...]:
        if rollout.sample_index in self.unreadable:
            raise self.unreadable[rollout.sample_index]
        return rollout.prompt_ids + rollout.token_ids

    def begin(self, metrics: Metrics) -> RewardedRows:
        scorer = HeldScorer(
            ScorerHeld("/hold/1", VERSION, (None,)), "r", lambda kind: f"/{kind}", self.score, self.gone
        )
        reading = Reading(self.read, lambda ids: len(ids) - 1)
        patience = Patience(self.timeout_s, self.deadline, lambda: self.now, self.sleep)
        return RewardedRows(self, scorer, reading, patience, metrics)


async def settled() -> None:
    """Whatever can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def play(engine: FakeEngine) -> Callable[[Callable[[Call, RewardedRows], Coroutine[Any, Any, None]], Call], Call]:
    def run(test: Callable[[Call, RewardedRows], Coroutine[Any, Any, None]], call: Call) -> Call:
        async def main() -> None:
            await asyncio.wait_for(test(call, call.begin(Metrics({BASE: engine}))), 30)  # type: ignore[dict-item]

        asyncio.run(main())
        return call

    return run


def put(call: Call, *events: RowFinished | RolloutError | None) -> None:
    for event in events:
        call.rows.put_nowait(event)


async def rest(rows: RewardedRows) -> list[tuple[int, RowReward]]:
    found = []
    async for event in rows:
        assert isinstance(event, RowFinished) and event.rollout.reward is not None
        found.append((event.rollout.sample_index, event.rollout.reward))
    return found


def codes(found: Sequence[tuple[int, RowReward]]) -> dict[int, str | None]:
    return {sample: reward.error.code if reward.error else None for sample, reward in found}


def test_a_row_comes_when_its_own_reward_is_there(play: Any) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        put(call, row(0), row(1))
        await settled()
        assert sorted(call.asked) == [10, 11], "the first is asked for while the request still runs"
        call.asked[11].set_result(0.5)
        second = await anext(rows)
        assert isinstance(second, RowFinished)
        assert second.rollout.reward == RowReward((0.5,), VERSION)
        put(call, row(2), None)
        await settled()
        for token, value in ((12, 2.0), (10, 0.0)):
            call.asked[token].set_result(value)
            await settled()
        assert [(sample, reward.value) for sample, reward in await rest(rows)] == [(2, 2.0), (0, 0.0)]
        with pytest.raises(StopAsyncIteration):
            await anext(rows)

    assert play(test, Call()).let_go == 1


@pytest.mark.parametrize(
    ("timeout_s", "deadline", "late"), [(3.0, None, 3.0), (None, 2.0, 2.0), (9.0, 2.0, 2.0), (1.0, 2.0, 1.0)]
)
def test_a_late_reward_costs_the_reward_alone(
    play: Any, timeout_s: float | None, deadline: float | None, late: float
) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        put(call, row(0), row(1), None)
        await settled()
        call.asked[11].set_result(0.5)
        await call.pass_to(late - 0.01)
        assert not call.asked[10].done()
        await call.pass_to(late)
        assert call.asked[10].cancelled(), "nobody reads what nobody waits for"
        assert codes(await rest(rows)) == {0: "timeout", 1: None}

    play(test, Call(timeout_s, deadline))


@pytest.mark.parametrize(
    ("timeout_s", "deadline", "says"), [(None, 2.0, "1.67"), (3.0, None, "3"), (0.25, 2.0, "0.25"), (None, 0.2, "0")]
)
def test_how_long_was_waited_is_told_in_hundredths(
    play: Any, timeout_s: float | None, deadline: float | None, says: str
) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        call.now = 1 / 3
        put(call, row(0), None)
        await settled()
        await call.pass_to(9.0)
        ((_, reward),) = await rest(rows)
        assert reward.error is not None
        assert reward.error.message == f"The reward was not there {says} seconds after the row had ended."

    play(test, Call(timeout_s, deadline))


def test_a_row_that_ends_after_the_deadline_is_not_waited_for(play: Any) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        call.now = 5.0
        put(call, row(0), None)
        await settled()
        await call.pass_to(5.0)
        assert codes(await rest(rows)) == {0: "timeout"}

    play(test, Call(deadline=2.0))


def test_rows_that_were_given_up_are_not_scored(play: Any) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        reasons = (FinishReason.ABORTED, FinishReason.ERROR, FinishReason.SUPERSEDED, FinishReason.STOP)
        put(call, *(row(index, reason) for index, reason in enumerate(reasons)), None)
        await settled()
        for future in call.asked.values():
            future.set_result(1.0)
        assert codes(await rest(rows)) == {0: "not_scored", 1: "not_scored", 2: None, 3: None}

    play(test, Call())


def test_a_failed_request_still_gives_the_rewards_of_its_rows(play: Any) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        put(call, row(0), row(1), EngineFault("The engine stopped: a test."))
        await settled()
        call.asked[10].set_exception(EngineFault("The step failed: a test."))
        call.asked[11].set_result(1.0)
        found = [await anext(rows), await anext(rows)]
        rewards = [(e.rollout.sample_index, e.rollout.reward) for e in found if isinstance(e, RowFinished)]
        assert codes([(at, reward) for at, reward in rewards if reward]) == {0: "engine_fault", 1: None}
        with pytest.raises(EngineFault, match="The engine stopped"):
            await anext(rows)

    assert play(test, Call()).let_go == 1


def test_whatever_a_row_s_reward_raises_costs_that_reward_alone(play: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A chat template is the model's own code, and a conversation may be nested as deeply as it likes."""

    async def test(call: Call, rows: RewardedRows) -> None:
        put(call, *map(row, range(4)), None)
        await settled()
        call.asked[12].set_exception(MemoryError("no room: a test"))
        call.asked[13].set_result(1.0)
        rewards = dict(await rest(rows))
        failed = "engine_fault"
        assert codes(list(rewards.items())) == {0: failed, 1: failed, 2: failed, 3: None}
        assert rewards[3].value == 1.0
        assert rewards[0].error is not None and "ZeroDivisionError" in rewards[0].error.message

    call = play(test, Call(unreadable={0: ZeroDivisionError("by zero: a test"), 1: RecursionError("deep: a test")}))
    assert call.let_go == 1
    assert "by zero: a test" in caplog.text, "the log says why"


def test_an_end_from_outside_ends_what_is_being_scored(play: Any) -> None:
    async def test(call: Call, rows: RewardedRows) -> None:
        put(call, row(0))
        await settled()
        put(call, row(1))
        rows.abort("disconnect")
        await settled()
        assert call.asked[10].cancelled()
        put(call, row(2), None)
        assert codes(await rest(rows)) == dict.fromkeys(range(3), "not_scored")
        rows.abort("disconnect")

    call = play(test, Call(timeout_s=9.0))
    assert (call.let_go, call.aborted) == (1, ["disconnect"] * 2)
    assert all(timer.done() for _, timer in call.timers)
