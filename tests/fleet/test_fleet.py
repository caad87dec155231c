"""A fleet of engines is one engine: same commands, same answers, whatever becomes of a replica."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import RowFinished, TokensSampled
from rollout_server.engine.messages.scoring import Embed, RecordedRow, Replay, Score
from rollout_server.engine.messages.versions import Activate, Delete, Export, Pin, Publish
from rollout_server.errors import (
    Conflict,
    EngineUnavailable,
    NeverAdmitted,
    PreconditionFailed,
    StalePolicy,
    UnknownPolicy,
    VersionGone,
)
from rollout_server.rollout import (
    FinishReason,
    PolicyAddress,
    Rollout,
    RolloutRequest,
    SamplingParams,
    SpanAddress,
    Wants,
)
from tests.support import tiny_models
from tests.support.fleet.kill_replicas import bundles, fleet_handle, push, run, until
from tests.support.fleet.side_by_side import SideBySide

PROMPTS = [(5, 9, 33), (44,), tuple(range(1, 41)), (7, 7, 7)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny")


def side_by_side(path: Path) -> SideBySide:
    """A fleet of two and one engine of the same model."""
    fleet = fleet_handle(path, 2, keep_versions=3)
    one = EngineHandle(EngineOptions(str(path), "tiny", kv_memory=2**24, keep_versions=3))
    return SideBySide(fleet, one, 300.0)


@pytest.fixture(scope="module")
def started(path: Path) -> Iterator[SideBySide]:
    both = side_by_side(path)
    yield both
    both.close()


def groups(id: str, policy: str = "base", n: int = 3, max_tokens: int = 12, **more: Any) -> list[RolloutRequest]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    address = PolicyAddress.parse(policy)
    return [
        RolloutRequest(
            id, prompt, sampling, address, n, index, tuple(range(index * 100, index * 100 + n)), **more
        )
        for index, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


async def rows(handle: EngineHandle, asked: list[RolloutRequest], **more: Any) -> list[Rollout]:
    id = handle.new_id("test")
    renamed = [replace(group, id=id) for group in asked]
    found = [event.rollout async for event in handle.submit(id, renamed, **more) if isinstance(event, RowFinished)]
    return sorted(found, key=lambda row: (row.prompt_index, row.sample_index))


async def streamed(handle: EngineHandle, asked: list[RolloutRequest]) -> list[Rollout]:
    """Rows whose tokens came as a stream: each token once, in its order, whatever became of replicas meanwhile."""
    id = handle.new_id("stream")
    told: dict[tuple[int, int], list[int]] = {}
    finished: dict[tuple[int, int], Rollout] = {}
    async for event in handle.submit(id, [replace(group, id=id) for group in asked]):
        if isinstance(event, TokensSampled):
            told.setdefault((event.prompt_index, event.sample_index), []).extend(event.token_ids)
        elif isinstance(event, RowFinished):
            finished[event.rollout.prompt_index, event.rollout.sample_index] = event.rollout
    assert {key: tuple(ids) for key, ids in told.items()} == {key: row.token_ids for key, row in finished.items()}
    return [finished[key] for key in sorted(finished)]


def drawn(found: list[Rollout]) -> list[tuple[int, int, tuple[int, ...], int]]:
    return [(row.prompt_index, row.sample_index, row.token_ids, row.seed) for row in found]


def test_rows_are_those_of_one_engine(started: SideBySide) -> None:
    async def both() -> None:
        assert started.fleet.info == replace(started.one.info, kv_memory=started.fleet.info.kv_memory)
        found, expected = await asyncio.gather(*(rows(h, groups("x")) for h in (started.fleet, started.one)))
        assert drawn(found) == drawn(expected) and len(found) == 12
        assert [row.finish_reason for row in found] == [FinishReason.LENGTH] * 12

    started.run(both())


def test_every_token_is_streamed_once_in_its_order(started: SideBySide) -> None:
    async def stream() -> None:
        assert len(await streamed(started.fleet, groups("x", wants=Wants(tokens_as_they_come=True)))) == 12

    started.run(stream())


def test_versions_are_numbered_kept_and_refused_as_by_one_engine(started: SideBySide) -> None:
    async def script(handle: EngineHandle) -> list[Any]:
        contents, said = bundles(handle, 5), []
        for content in contents[:2]:
            published = await handle.publish(Publish(handle.new_id("p"), "p", content, label=f"l{len(said)}"))
            said.append((published.version, published.live, published.unchanged, published.mode))
        again = await handle.publish(Publish(handle.new_id("p"), "p", contents[1]))
        said.append((again.version, again.unchanged))
        renamed = await handle.publish(Publish(handle.new_id("p"), "p", contents[1], label="renamed"))
        spans = {span for row in await rows(handle, groups("x", "p")) for span in row.spans}
        said.append((renamed.version, renamed.unchanged, spans))
        with pytest.raises(PreconditionFailed):
            await handle.publish(Publish(handle.new_id("p"), "p", contents[2], if_match="1"))
        said.append(drawn(await rows(handle, groups("x", "p"))))
        said.append(drawn(await rows(handle, groups("x", "p@1"))))
        moved = await handle.activate(Activate(handle.new_id("a"), "p", 1))
        said += [moved.version, drawn(await rows(handle, groups("x", "p")))]
        await handle.pin(Pin(handle.new_id("pin"), "p", 2, True))
        for content in contents[2:]:
            await push(handle, content, "p")
        (policy,) = (policy for policy in handle.status.policies if policy.name == "p")
        said.append([(kept.version, kept.live, kept.pinned, kept.rank) for kept in policy.versions])
        with pytest.raises(VersionGone):
            await rows(handle, groups("x", "p@1"))
        exported = await handle.export(Export(handle.new_id("e"), "p", 5))
        said.append((exported.version, exported.bundle.digest))
        with pytest.raises(StalePolicy):
            await rows(handle, groups("x", "p", min_version=9))
        with pytest.raises(Conflict):
            await handle.delete(Delete(handle.new_id("d"), "p", 5))
        deleted = await handle.delete(Delete(handle.new_id("d"), "p"))
        said.append((deleted.name, deleted.last, deleted.numbers))
        with pytest.raises(UnknownPolicy):
            await rows(handle, groups("x", "p"))
        said.append(await push(handle, contents[0], "p"))
        said.append(drawn(await rows(handle, groups("x", "p"))))
        await handle.delete(Delete(handle.new_id("d"), "p"))
        return said

    async def both() -> None:
        found, expected = await asyncio.gather(script(started.fleet), script(started.one))
        assert found == expected

    started.run(both())


def test_work_waits_for_the_version_that_it_asks_for(started: SideBySide) -> None:
    async def waits() -> None:
        fleet = started.fleet
        contents = bundles(fleet, 2)
        await push(fleet, contents[0], "w")
        late = asyncio.create_task(rows(fleet, groups("x", "w", n=40, min_version=2, wait_s=60.0)))
        assert len(await rows(fleet, groups("x", "w"))) == 12, "others pass"
        await push(fleet, contents[1], "w")
        assert {row.spans[0].version.number for row in await late} == {2}

    started.run(waits())


def test_whoever_is_told_of_an_end_can_see_it_in_the_status(started: SideBySide) -> None:
    async def looks(handle: EngineHandle) -> None:
        for _ in range(5):
            before = handle.status
            found = await rows(handle, groups("x"))
            after = handle.status
            assert after.tokens - before.tokens == sum(row.sampled for row in found) == 144
            assert after.steps > before.steps and after.running == after.waiting_rows == 0
            await handle.pause("wait")
            assert handle.status.paused == "wait"
            await handle.resume()
            assert handle.status.paused is None

    async def both() -> None:
        await asyncio.gather(*map(looks, (started.fleet, started.one)))

    started.run(both())


def test_readings_pauses_and_aborts(started: SideBySide) -> None:
    async def read(handle: EngineHandle) -> list[Any]:
        base = PolicyAddress("base")
        found = await rows(handle, groups("x"))
        scored = await handle.score(Score(handle.new_id("s"), base, tuple(PROMPTS), (0, 0, 0, 0)))
        vectors = await handle.embed(Embed(handle.new_id("e"), base, tuple(PROMPTS)))
        spans, judged = (SpanAddress(base, 0, 12),), (True,) * 12
        recorded = tuple(
            RecordedRow(row.prompt_ids, row.token_ids, spans, judged, row.logprobs, row.sampling, row.seed)
            for row in found
        )
        replayed = await handle.replay(Replay(handle.new_id("y"), recorded))
        assert all(row.exact for row in replayed.rows)
        assert (await handle.reset_prefix_cache()).freed_bytes >= 0 and (await handle.release()).nbytes >= 0
        await handle.pause("wait")
        held = asyncio.create_task(rows(handle, groups("x")))
        await asyncio.sleep(0.3)
        assert not held.done() and handle.status.paused == "wait"
        await handle.resume()
        assert drawn(await held) == drawn(found)
        subscription = handle.submit("long", groups("long", max_tokens=2000))
        await asyncio.sleep(0.3)
        assert handle.abort(["long"]) == ("long",)
        ended = [event.rollout async for event in subscription if isinstance(event, RowFinished)]
        assert {row.finish_reason for row in ended} == {FinishReason.ABORTED} and len(ended) == 12
        # More groups than have room at once: those that wait end with those that run.
        asked = [
            replace(groups("x", n=40, max_tokens=2000)[index % 4], prompt_index=index, seeds=tuple(range(40)))
            for index in range(12)
        ]
        await until(lambda: not handle.status.running)
        ending = asyncio.create_task(rows(handle, asked))
        await until(lambda: handle.status.running)
        await handle.pause("abort")
        stopped = {(row.finish_reason, row.stop_reason) for row in await asyncio.wait_for(ending, 60)}
        assert stopped == {(FinishReason.ABORTED, "pause")} and len(ending.result()) == 480
        await handle.resume()
        return [[len(s.logprobs) for s in scored.sequences], [len(vector) for vector in vectors.vectors], drawn(found)]

    async def both() -> None:
        found, expected = await asyncio.gather(read(started.fleet), read(started.one))
        assert found == expected
        assert await started.fleet.ping(5)

    started.run(both())


def test_a_deadline_ends_what_runs_and_what_never_began(started: SideBySide) -> None:
    async def late() -> None:
        clock, found = asyncio.get_running_loop().time, list[Rollout]()
        for patience in (0.3, 1, 3, 9):  # A busy machine may take longer than the first until all of them run.
            with suppress(NeverAdmitted):
                found = await rows(started.fleet, groups("x", max_tokens=2000), deadline=clock() + patience)
            if found and all(row.token_ids for row in found):
                break
        assert {(row.finish_reason, row.stop_reason) for row in found} == {(FinishReason.ABORTED, "timeout")}
        await started.fleet.pause("wait")
        with pytest.raises(NeverAdmitted):
            await rows(started.fleet, groups("x"), deadline=clock() + 0.2)
        await started.fleet.resume()

    started.run(late())


@pytest.mark.long
def test_a_base_that_cannot_be_loaded_is_told_by_the_fleet(tmp_path: Path) -> None:
    async def start() -> None:
        handle = fleet_handle(tmp_path, 1)
        handle.start()
        with pytest.raises(EngineUnavailable, match=r"config\.json"):
            await handle.wait_ready()
        await handle.close()

    asyncio.run(start())


def alive(handle: EngineHandle, count: int) -> Callable[[], bool]:
    return lambda: sum(replica.state == "live" for replica in handle.status.replicas) == count


@pytest.mark.long
def test_rows_of_a_killed_replica_come_back_token_for_token(started: SideBySide) -> None:
    async def kill() -> None:
        fleet = started.fleet
        await push(fleet, bundles(fleet, 1)[0])
        asked = groups("x", "trained", n=4, max_tokens=150)
        expected, staged = drawn(await rows(started.fleet, asked)), fleet.status.replicas[0].versions_staged
        again = asyncio.create_task(rows(fleet, asked))
        await until(lambda: all(replica.running for replica in fleet.status.replicas))
        os.kill(fleet.status.replicas[0].pid or 0, signal.SIGKILL)
        assert drawn(await again) == expected
        await until(alive(fleet, 2))
        assert [replica.versions_staged for replica in fleet.status.replicas] == [staged, staged]

    started.run(kill())


@pytest.mark.long
def test_rows_of_a_killed_a_stopped_and_a_drained_replica_come_back_token_for_token(path: Path) -> None:
    """What is stopped is as silent as what is cut off, and drained is one without processes, in test_failures.py."""

    async def scenes() -> None:
        handle = fleet_handle(path, 2, silent_s=6.0)
        handle.start()
        await handle.wait_ready()
        await push(handle, bundles(handle, 1)[0])
        asked = groups("x", "trained", n=4, max_tokens=150, wants=Wants(tokens_as_they_come=True))
        expected = drawn(await streamed(handle, asked))
        for number in (signal.SIGKILL, signal.SIGSTOP):
            again = asyncio.create_task(streamed(handle, asked))
            await until(lambda: all(replica.running for replica in handle.status.replicas))
            os.kill(handle.status.replicas[0].pid or 0, number)
            assert drawn(await again) == expected
            await until(alive(handle, 2))
            assert [replica.versions_staged for replica in handle.status.replicas] == [1, 1]
        again = asyncio.create_task(streamed(handle, asked))
        await until(lambda: all(replica.running for replica in handle.status.replicas))
        await handle.leave(handle.status.replicas[0].id, at_once=False)
        assert drawn(await again) == expected
        await until(lambda: len(handle.status.replicas) == 1)
        await handle.leave(handle.status.replicas[0].id, at_once=True)
        with pytest.raises(EngineUnavailable, match="replica"):
            await rows(handle, asked, deadline=asyncio.get_running_loop().time() + 3.0)
        await handle.close()

    asyncio.run(scenes())


@pytest.mark.long
def test_kills_under_load_and_pushes_lose_nothing(path: Path) -> None:
    seen = asyncio.run(run(path, 8))
    assert seen.kills == 8 and seen.rows and seen.pushes
