"""The asyncio face: readiness, refusal at the door, and nobody left waiting when the thread ends."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.engine.messages.scoring import Score
from rollout_server.engine.messages.versions import Publish
from rollout_server.engine.open_requests import HeldScorer
from rollout_server.errors import Conflict, ContextExceeded, EngineUnavailable, InvalidField, QueueFull, UnknownPolicy
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams
from tests.support.tiny_scorers import reward_bundle


def group(
    max_tokens: int = 8, policy: str = "base", prompt: tuple[int, ...] = (1, 2, 3), **kwargs: object
) -> RolloutRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return RolloutRequest("x", prompt, sampling, PolicyAddress.parse(policy), seeds=(1,), **kwargs)  # type: ignore[arg-type]


def renamed(request: RolloutRequest, id: str) -> RolloutRequest:
    return replace(request, id=id)


def test_many_requests_each_answered_once(qwen: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(qwen), "tiny", max_batch=8))
        with pytest.raises(EngineUnavailable):
            handle.submit("early", [group()])
        handle.start()
        await handle.wait_ready()
        assert handle.status.state == "ready" and await handle.ping(10)

        async def one(k: int) -> int:
            events = [e async for e in handle.submit(f"r{k}", [renamed(group(3 + k % 5), f"r{k}")])]
            assert len(events) == 1 and isinstance(events[0], RowFinished)
            return len(events[0].rollout.token_ids)

        assert await asyncio.gather(*(one(k) for k in range(60))) == [3 + k % 5 for k in range(60)]
        await handle.close()
        assert handle.status.state == "stopping" and not await handle.ping(1)

    asyncio.run(run())


def test_refused_at_the_door(qwen: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(qwen), "tiny", max_queue=2, max_rows_per_request=4, kv_memory=2**20))
        handle.start()
        await handle.wait_ready()
        with pytest.raises(InvalidField, match="outside the vocabulary"):
            handle.submit("a", [group(prompt=(1, 99999))])
        with pytest.raises(ContextExceeded, match="context of 2048"):
            handle.submit("a", [group(2047)])
        with pytest.raises(ContextExceeded, match="--kv-memory"):
            handle.submit("a", [group(1500)])
        with pytest.raises(InvalidField, match="rows"):
            handle.submit("a", [group(), group(), group(), group(), group()])
        first = handle.submit("a", [renamed(group(500), "a")])
        with pytest.raises(Conflict):
            handle.submit("a", [renamed(group(), "a")])
        second = handle.submit("b", [renamed(group(500), "b")])
        with pytest.raises(QueueFull) as full:
            handle.submit("c", [renamed(group(), "c")])
        assert full.value.retryable
        first.abort()
        second.abort()
        assert [type(e).__name__ async for e in first] == ["RowFinished"]
        assert [type(e).__name__ async for e in second] == ["RowFinished"]
        with pytest.raises(UnknownPolicy):
            [e async for e in handle.submit("d", [renamed(group(policy="nobody"), "d")])]
        assert handle.abort(["a", "nobody"]) == ()
        await handle.close()

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_leaves_nobody_waiting(qwen: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(qwen), "tiny", resident="dying"))
        handle.start()
        await handle.wait_ready()
        running = handle.submit("a", [renamed(group(1500), "a")])
        turn = Engine.turn

        def last(self: Engine) -> None:
            if threading.current_thread().name == "engine dying":
                raise MemoryError("no memory left")
            turn(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "turn", last)
            with pytest.raises(EngineUnavailable, match="no memory left"):
                async for _ in running:
                    pass
            with pytest.raises(EngineUnavailable, match="no memory left"):
                await handle.score(Score("s", PolicyAddress("base"), ((1, 2),), (0,)))
        assert handle.status.state == "dead" and "no memory left" in (handle.status.fault or "")
        assert not await handle.ping(1)
        with pytest.raises(EngineUnavailable, match="no memory left"):
            handle.submit("b", [renamed(group(), "b")])
        await handle.close()

    asyncio.run(run())


def test_a_model_that_does_not_load_is_reported(tmp_path: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(tmp_path), "nothing"))
        handle.start()
        with pytest.raises(EngineUnavailable, match=r"config\.json cannot be read"):
            await handle.wait_ready()
        assert handle.status.state == "dead"

    asyncio.run(run())


def test_scoring_many_sequences_beside_running_rows(qwen: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(qwen), "tiny", prefill_tokens=64))
        handle.start()
        await handle.wait_ready()
        rows = handle.submit("a", [renamed(group(200), "a")])
        sequences = tuple(tuple(range(k, k + 40)) for k in range(20))
        scored = await handle.score(Score("s", PolicyAddress("base"), sequences, (0,) * 20))
        assert [len(s.logprobs) for s in scored.sequences] == [40] * 20
        assert [type(e).__name__ async for e in rows] == ["RowFinished"]
        await handle.close()

    asyncio.run(run())


def test_what_cannot_be_scored_is_refused_at_the_door(qwen: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(qwen), "tiny", context_length=128))
        handle.start()
        await handle.wait_ready()

        async def score(tokens: tuple[int, ...], start: int = 0, **options: float) -> None:
            # The first is right: one wrong sequence refuses the whole.
            await handle.score(Score("s", PolicyAddress("base"), ((1, 2), tokens), (0, start), **options))  # type: ignore[arg-type]

        vocabulary, longest = handle.info.vocab_size, handle.info.max_model_len
        for token in (-1, vocabulary, 2**40):
            with pytest.raises(InvalidField, match=f"{token} is outside the vocabulary"):
                await score((1, token))
        for start in (-1, 3, 2**40):
            with pytest.raises(InvalidField, match=f"start is {start}, but the sequence has 3 tokens"):
                await score((1, 2, 3), start)
        with pytest.raises(InvalidField, match="0 tokens"):
            await score(())
        with pytest.raises(ContextExceeded, match=f"has {longest + 1} tokens; the context holds {longest}"):
            await score((1,) * (longest + 1))
        for temperature in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(InvalidField, match="temperature"):
                await score((1, 2), temperature=temperature)
        await score((1, vocabulary - 1, 3), 2)
        await score((1,) * longest, longest - 1)
        await handle.close()

    asyncio.run(run())


def test_a_request_is_open_until_its_scorer_was_let_go(qwen: Path) -> None:
    async def run() -> None:
        handle = EngineHandle(EngineOptions(str(qwen), "tiny", max_queue=2))
        handle.start()
        await handle.wait_ready()
        rm = PolicyAddress("rm")
        with pytest.raises(UnknownPolicy):
            await handle.hold("r", rm)
        await handle.publish(Publish("p", "rm", reward_bundle(handle.info)))
        scorer, other = await asyncio.gather(handle.hold("r", rm), handle.hold("r", rm), return_exceptions=True)
        assert isinstance(scorer, HeldScorer) and isinstance(other, Conflict)
        with pytest.raises(Conflict):
            handle.submit("r", [renamed(group(), "r")])
        events = [e async for e in handle.submit("r", [renamed(group(), "r")], scorer=scorer)]
        assert len(events) == 1
        scores = await asyncio.gather(*(scorer.scores([1, 2, k], 2) for k in range(5)))
        assert all(len(own) == 1 for own in scores), "more than --max-queue: the request was accepted"
        with pytest.raises(ContextExceeded):
            await scorer.scores([1] * 4096, 0)
        reading = asyncio.ensure_future(scorer.scores([1] * 2000, 1999))
        await asyncio.sleep(0)
        assert handle.abort(["r", "nobody"]) == ("r",)
        with pytest.raises(EngineUnavailable, match="abort"):
            await reading
        scorer.let_go()
        scorer.let_go()
        assert handle.abort(["r"]) == ()
        assert len([e async for e in handle.submit("r", [renamed(group(), "r")])]) == 1
        await handle.ping(10)
        assert [version.rows_in_use for line in handle.status.policies for version in line.versions] == [0]
        with pytest.raises(EngineUnavailable):
            await scorer.scores([1, 2], 1)
        await handle.close()

    asyncio.run(run())
