"""What becomes of a fleet when something fails: one scene for each row of its table of failures.

Replicas that are killed, stopped or drained: `test_fleet.py`; a request that ends replicas: `ledger/test_ledger.py`;
replicas of other weights: `test_terms.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.bundle import AdapterBundle
from adapters.versions.store import NameRecord, StateStore
from rollout_server.engine.messages.versions import Publish, Published
from rollout_server.errors import EngineUnavailable, StorageFailed, WeightsMemoryExceeded
from rollout_server.rollout import PolicyAddress, Rollout, RolloutRequest, SamplingParams
from tests.support import tiny_models
from tests.support.fleet.joined_here import Cable, Joined, Led, driven, live
from tests.support.fleet.kill_replicas import bundles, until

SILENT_S = 5.0
NAME = "trained"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny")


class Scene:
    """A controller on a state directory, and replicas that join it by cables."""

    def __init__(self, model: Path, state: Path) -> None:
        self.model, self.state, self.replicas = model, state, list[Joined]()

    async def led(self, port: int = 0, store: type[StateStore] = StateStore, fewest: int = 1) -> Led:
        led = Led(self.model, store(self.state), SILENT_S, fewest)
        self.port = await led.open(port)
        for replica in self.replicas:
            replica.cable.target = self.port
        return led

    async def join(self, name: str, weights_memory: int | None = None) -> Joined:
        joined = Joined(self.model, name, SILENT_S, Cable(self.port), weights_memory)
        await joined.start()
        self.replicas.append(joined)
        return joined

    async def over(self) -> None:
        for replica in self.replicas:
            await replica.stop()


@pytest.fixture
def play(path: Path, tmp_path: Path) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    def run(scenes: Callable[[Scene], Awaitable[None]]) -> None:
        async def all_of_it() -> None:
            scene = Scene(path, tmp_path / "state")
            try:
                await scenes(scene)
            finally:
                await scene.over()

        driven(all_of_it())

    return run


def asked(policy: str, n: int = 4, max_tokens: int = 100) -> list[RolloutRequest]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompts = [(5, 9, 33), (44,), tuple(range(1, 41)), (7, 7, 7)]
    return [
        RolloutRequest(
            "x", prompt, sampling, PolicyAddress.parse(policy), n, index, tuple(range(index * 9, index * 9 + n))
        )
        for index, prompt in enumerate(prompts)
    ]


def drawn(rows: list[Rollout]) -> list[tuple[int, ...]]:
    return [row.token_ids for row in rows]


async def pushed(led: Led, bundle: AdapterBundle) -> Published:
    return await led.publisher.publish(Publish(led.handle.new_id("p"), NAME, bundle))


@pytest.mark.long
def test_rows_beyond_a_cut_link_come_back_from_elsewhere_and_the_replica_with_its_versions(
    play: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rollout_server.fleet")

    async def scenes(scene: Scene) -> None:
        led = await scene.led()
        far, _ = await scene.join("far"), await scene.join("near")
        await led.ready()
        await live(led, 2)
        await pushed(led, bundles(led.handle, 1)[0])
        expected = drawn(await led.rows(asked(NAME)))
        again = asyncio.create_task(led.rows(asked(NAME)))
        await until(lambda: all(each.running for each in led.handle.status.replicas))
        far.cable.cut()
        assert drawn(await again) == expected
        await until(lambda: "dead" in led.states())
        # A push is not held up by it, and it has that version, too, before it gets rows again.
        second = await pushed(led, bundles(led.handle, 2)[1])
        far.cable.mend()
        await live(led, 2)
        assert [each.versions_staged for each in led.handle.status.replicas] == [2, 2] and second.version.number == 2
        assert drawn(await led.rows(asked(f"{NAME}@1"))) == expected
        assert "far has trained@1 already" in caplog.text and "far has trained@2 already" not in caplog.text
        await led.close()

    play(scenes)


@pytest.mark.long
def test_rows_of_a_drained_replica_come_back_and_without_one_they_are_refused(play: Any) -> None:
    async def scenes(scene: Scene) -> None:
        led = await scene.led()
        await scene.join("one")
        await scene.join("two")
        await led.ready()
        await live(led, 2)
        await pushed(led, bundles(led.handle, 1)[0])
        expected = drawn(await led.rows(asked(NAME)))
        again = asyncio.create_task(led.rows(asked(NAME)))
        await until(lambda: all(each.running for each in led.handle.status.replicas))
        await led.handle.leave(led.handle.status.replicas[0].id, at_once=False)
        assert drawn(await again) == expected
        await until(lambda: len(led.handle.status.replicas) == 1)
        await led.handle.leave(led.handle.status.replicas[0].id, at_once=True)
        with pytest.raises(EngineUnavailable, match="replica"):
            await led.rows(asked(NAME), deadline=asyncio.get_running_loop().time() + 3.0)
        await led.close()

    play(scenes)


class Killed(Exception):
    """What ends a controller."""


class Dies(StateStore):
    """The directory of one that is killed once the record of a second version is written."""

    def write(self, record: NameRecord) -> None:
        super().write(record)
        if record.last > 1:
            raise Killed


def test_a_controller_that_was_killed_between_record_and_flip_serves_what_it_recorded(
    play: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rollout_server.fleet")

    async def scenes(scene: Scene) -> None:
        led = await scene.led(store=Dies)
        await scene.join("one")
        await scene.join("two")
        await led.ready()
        await live(led, 2)
        contents = bundles(led.handle, 2)
        first = await pushed(led, contents[0])
        with pytest.raises(Killed):
            await pushed(led, contents[1])
        (policy,) = led.handle.status.policies
        assert policy.live == first.version, "nothing was flipped"
        await led.close()
        again = await scene.led()
        await again.ready()
        await live(again, 2)
        (policy,) = again.handle.status.policies
        assert policy.live is not None and policy.live.number == 2, "the record is the point of no return"
        retried = await pushed(again, contents[1])
        assert retried.unchanged and retried.version.number == 2
        assert {row.spans[0].version.number for row in await again.rows(asked(NAME, max_tokens=4))} == {2}
        # Both replicas had both versions, and were sent neither.
        assert all(f"{id} has trained@{number} already" in caplog.text for id in ("one", "two") for number in (1, 2))
        await again.close()

    play(scenes)


class Full(StateStore):
    """A disk without room for a record of a second version."""

    def write(self, record: NameRecord) -> None:
        if record.last > 1:
            raise OSError(28, "No space left on device")
        super().write(record)


def test_on_a_full_disk_nothing_is_flipped_anywhere(play: Any) -> None:
    async def scenes(scene: Scene) -> None:
        led = await scene.led(store=Full)
        await scene.join("one")
        await scene.join("two")
        await led.ready()
        await live(led, 2)
        contents = bundles(led.handle, 2)
        await pushed(led, contents[0])
        before = drawn(await led.rows(asked(NAME, max_tokens=8)))
        with pytest.raises(StorageFailed, match="No space left"):
            await pushed(led, contents[1])
        assert drawn(await led.rows(asked(NAME, max_tokens=8))) == before
        # Freed everywhere; a replica that was starved for so long that it counts as dead has to come back first.
        await until(lambda: [each.versions_staged for each in led.handle.status.replicas] == [1, 1])
        await led.close()

    play(scenes)


def test_with_fewer_replicas_than_there_have_to_be_versions_do_not_change(play: Any) -> None:
    async def scenes(scene: Scene) -> None:
        led = await scene.led(fewest=2)
        far, _ = await scene.join("far"), await scene.join("near")
        await led.ready()
        contents = bundles(led.handle, 2)
        await pushed(led, contents[0])
        before = drawn(await led.rows(asked(NAME, max_tokens=8)))
        far.cable.cut()
        # It is found out while the version is staged, and then known.
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="at least 2 are") as refused:
                await pushed(led, contents[1])
            assert refused.value.retryable
        assert drawn(await led.rows(asked(NAME, max_tokens=8))) == before, "rows are served all the same"
        far.cable.mend()
        await live(led, 2)
        assert (await pushed(led, contents[1])).version.number == 2
        await led.close()

    play(scenes)


def test_what_a_replica_has_no_room_for_is_refused_everywhere(play: Any) -> None:
    async def scenes(scene: Scene) -> None:
        led = await scene.led()
        await scene.join("one", weights_memory=2000)
        await scene.join("two", weights_memory=2000)
        await led.ready()
        await live(led, 2)
        with pytest.raises(WeightsMemoryExceeded):
            await pushed(led, bundles(led.handle, 1)[0])
        assert led.handle.status.policies == () and len(await led.rows(asked("base", max_tokens=8))) == 16
        await led.close()

    play(scenes)


def test_a_replica_that_has_no_room_for_a_kept_version_ends_and_says_so(play: Any) -> None:
    async def scenes(scene: Scene) -> None:
        led = await scene.led()
        await scene.join("one")
        await led.ready()
        await live(led, 1)
        await pushed(led, bundles(led.handle, 1)[0])
        small = await scene.join("small", weights_memory=2000)
        await until(small.running.done)
        assert isinstance(small.running.exception(), WeightsMemoryExceeded)
        assert led.states().count("live") == 1
        scene.replicas.remove(small)
        await small.cable.remove()
        await led.close()

    play(scenes)
