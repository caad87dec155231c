"""An engine of two ranks is one engine: same rows, same versions, same answers, and it does not outlive a rank."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adapters.bundle import AdapterBundle
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import EngineOptions, RankOptions
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.engine.messages.scoring import Replay, Score
from rollout_server.engine.messages.versions import Publish
from rollout_server.errors import AdapterMismatch, EngineUnavailable
from rollout_server.rollout import PolicyAddress, Rollout, RolloutRequest, SamplingParams
from tests.laws.grids import some_long
from tests.support import tiny_models
from tests.support.adapter_files import make
from tests.support.engine.driver import recorded
from tests.support.fleet.kill_replicas import fleet_handle, until
from tests.support.fleet.side_by_side import SideBySide

# Ranks wait for each other by spinning: a machine with fewer free cores than ranks is slow at it.
pytestmark = pytest.mark.timeout(900)
PROMPTS = [(5, 9, 33), (44,), tuple(range(1, 41)), (7, 7, 7)]
CLOSE = 1e-4
"""Log-probabilities of float32: sums over ranks add in another order."""


def side_by_side(path: Path, **options: object) -> SideBySide:
    """Two ranks, with options of their own, and one process of the same model."""
    fleet = fleet_handle(path, 1, ranks=RankOptions(2, silent_s=15.0), context_length=1500, **options)
    one = EngineHandle(EngineOptions(str(path), "tiny", kv_memory=2**24, context_length=1500))
    return SideBySide(fleet, one, 400.0)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SideBySide]:
    both = side_by_side(tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny"))
    yield both
    both.close()


def contents(handle: EngineHandle) -> list[AdapterBundle]:
    """LoRA, DoRA and LoRA of another rank, on every linear layer."""
    layers = handle.info.layers
    return [make(layers, 1, 8), make(layers, 2, 16, dora=True), make(layers, 3, 4)]


async def push(handle: EngineHandle, bundle: AdapterBundle, name: str) -> int:
    published = await handle.publish(Publish(handle.new_id("publish"), name, bundle))
    return published.version.number


def groups(policy: str, *, n: int = 2, max_tokens: int = 12, temperature: float = 1.0) -> list[RolloutRequest]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=temperature)
    address = PolicyAddress.parse(policy)
    return [
        RolloutRequest("", prompt, sampling, address, n, index, tuple(range(index * 100, index * 100 + n)))
        for index, prompt in enumerate(PROMPTS)
    ]


async def rows(handle: EngineHandle, asked: list[RolloutRequest]) -> list[Rollout]:
    id = handle.new_id("test")
    renamed = [replace(group, id=id) for group in asked]
    found = [event.rollout async for event in handle.submit(id, renamed) if isinstance(event, RowFinished)]
    return sorted(found, key=lambda row: (row.prompt_index, row.sample_index))


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    assert [row.token_ids for row in found] == [row.token_ids for row in expected]
    gaps = [np.abs(np.subtract(row.logprobs, other.logprobs)).max() for row, other in zip(found, expected, strict=True)]
    assert max(gaps) <= CLOSE


async def assert_drawn_alike(one: EngineHandle, found: list[Rollout], expected: list[Rollout]) -> None:
    """The rows are the same, but where a draw's number falls as near to the edge between two tokens as sums in another
    order move it: either row may be the one that a replay, which reads a row at once, draws otherwise."""
    pairs = list(zip(found, expected, strict=True))
    ties = [pair for pair in pairs if pair[0].token_ids != pair[1].token_ids]
    assert len(ties) <= 1, ties
    sent = [recorded(row, spans=recorded(other).spans) for mine, other in ties for row in (mine, other)]
    replayed = await one.replay(Replay(one.new_id("replay"), tuple(sent)))
    for mine, theirs in zip(replayed.rows[::2], replayed.rows[1::2], strict=True):
        margins = [again.margin for again in (mine, theirs) if not again.exact]
        assert margins and all(margin is not None and margin <= CLOSE for margin in margins), replayed
    alike = [pair for pair in pairs if pair[0].token_ids == pair[1].token_ids]
    assert_same([row for row, _ in alike], [other for _, other in alike])


def assert_rows_are_those_of_one_process(started: SideBySide) -> None:
    async def script(handle: EngineHandle) -> list[list[Rollout]]:
        for name, bundle in zip("abc", contents(handle), strict=True):
            await push(handle, bundle, name)
        drawn = {"base": 0.0, "a": 1.0, "b": 0.0, "c": 1.0}
        asked = [groups(policy, temperature=temperature) for policy, temperature in drawn.items()]
        return await asyncio.gather(*(rows(handle, groups) for groups in asked))

    async def both() -> None:
        found, expected = await asyncio.gather(script(started.fleet), script(started.one))
        for mine, theirs in zip(found, expected, strict=True):
            await assert_drawn_alike(started.one, mine, theirs)
        assert len({tuple(row.token_ids for row in of) for of in expected}) == 4, "the adapters change what is drawn"

    started.run(both())


def test_rows_of_base_lora_and_dora_in_one_batch_are_those_of_one_process(started: SideBySide) -> None:
    assert_rows_are_those_of_one_process(started)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_rows_of_other_families_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    """Layers with a bias, heads that share the embedding's weight or have one of their own, and experts."""
    both = side_by_side(tiny_models.build(family, tmp_path / family))
    try:
        assert_rows_are_those_of_one_process(both)
    finally:
        both.close()


@pytest.mark.long
def test_compiled_steps_of_ranks_warm_up_and_give_the_rows_of_one_process(tmp_path: Path) -> None:
    """As they run on a GPU: sums over ranks are inside the trace."""
    path = tiny_models.build("qwen3", tmp_path / "tiny")
    both = side_by_side(path, compile_decode=True, max_batch=4)
    try:
        assert_rows_are_those_of_one_process(both)
    finally:
        both.close()


def test_what_is_known_of_the_model_is_what_one_process_knows(started: SideBySide) -> None:
    two, one = started.fleet.info, started.one.info
    assert (two.ranks, two.layers, two.parameters, two.digest) == (2, one.layers, one.parameters, one.digest)
    assert two.weight_bytes < one.weight_bytes and two.kv_bytes_per_token * 2 == one.kv_bytes_per_token


def test_versions_change_while_rows_decode(started: SideBySide) -> None:
    """Every row is that of the version which its group was admitted under, whatever was pushed meanwhile."""

    async def swap() -> None:
        handle, expected, running = started.fleet, {}, []
        for bundle in contents(handle):
            number = await push(handle, bundle, "swapped")
            await push(started.one, bundle, f"kept{number}")
            expected[number] = await rows(started.one, groups(f"kept{number}", max_tokens=60))
            running.append(asyncio.create_task(rows(handle, groups("swapped", max_tokens=60))))
            await until(lambda: handle.status.replicas[0].running > 0 or running[-1].done())
        for found in await asyncio.gather(*running):
            versions = {span.version.number for row in found for span in row.spans}
            assert len(versions) == 1 and all(len(row.spans) == 1 for row in found)
            await assert_drawn_alike(started.one, found, expected[versions.pop()])

    started.run(swap())


@pytest.mark.long
def test_a_load_that_takes_too_long_ends_by_name_though_both_ranks_live(tmp_path: Path) -> None:
    """As one does in which a rank waits for another that does not come to the same check."""

    async def start() -> None:
        handle = fleet_handle(tiny_models.build("qwen3", tmp_path / "tiny"), 1, ranks=RankOptions(2, load_s=0.01))
        handle.start()
        try:
            with pytest.raises(EngineUnavailable, match="2 ranks have not loaded the model and tried it together"):
                await asyncio.wait_for(handle.wait_ready(), 400)
        finally:
            await handle.close()

    asyncio.run(start())


def test_scores_are_those_of_one_process(started: SideBySide) -> None:
    async def both() -> None:
        for handle in (started.fleet, started.one):
            await push(handle, contents(handle)[1], "scored")
        sequences = tuple((*prompt, 3, 1, 4) for prompt in PROMPTS)
        starts, address = tuple(map(len, PROMPTS)), PolicyAddress("scored")
        found, expected = [
            await handle.score(Score(handle.new_id("score"), address, sequences, starts))
            for handle in (started.fleet, started.one)
        ]
        for mine, theirs in zip(found.sequences, expected.sequences, strict=True):
            assert np.abs(np.subtract(mine.logprobs, theirs.logprobs)).max() <= CLOSE

    started.run(both())


def test_a_merged_version_is_refused_by_name(started: SideBySide) -> None:
    async def push_merged() -> None:
        bundle = contents(started.fleet)[0]
        with pytest.raises(AdapterMismatch, match="not served by several ranks"):
            await started.fleet.publish(Publish(started.fleet.new_id("p"), "merged", bundle, mode="merged"))
        assert await push(started.fleet, bundle, "as_it_is") == 1, "the engine goes on"

    started.run(push_merged())


@pytest.mark.long
def test_ranks_do_the_same_for_more_than_a_thousand_turns(started: SideBySide) -> None:
    """One that did not would have ended the engine: digests of every turn are compared."""

    async def long() -> None:
        group, restarts = groups("base", n=1, max_tokens=1050)[0], started.fleet.status.replicas[0].restarts
        [row] = await rows(started.fleet, [group])
        assert len(row.token_ids) == 1050
        await assert_drawn_alike(started.one, [row], await rows(started.one, [group]))
        assert started.fleet.status.replicas[0].restarts == restarts

    started.run(long())


# While one is stopped the other spins: a core for the fifteen seconds of silence.
@pytest.mark.parametrize("how", some_long([signal.SIGKILL, signal.SIGSTOP], signal.SIGKILL))
@pytest.mark.long
def test_rows_of_ranks_of_which_one_is_killed_or_stopped_come_back(started: SideBySide, how: signal.Signals) -> None:
    """The engine ends by name, at once or when the rank was silent for as long as it may be; versions do not change
    while there is none, and its rows are drawn again by the next."""

    async def kill() -> None:
        handle, asked = started.fleet, groups("base", max_tokens=200)
        before = handle.status.replicas[0]
        running = asyncio.create_task(rows(handle, asked))
        await until(lambda: handle.status.replicas[0].running > 0)
        os.kill(follower_of(before.pid), how)
        await until(lambda: handle.status.replicas[0].state != "live", 60)
        with pytest.raises(EngineUnavailable) as refused:
            await push(handle, contents(handle)[0], "meanwhile")
        assert refused.value.retryable
        await assert_drawn_alike(started.one, await running, await rows(started.one, asked))
        assert handle.status.replicas[0].restarts == before.restarts + 1

    started.run(kill())


def follower_of(pid: int | None) -> int:
    """The process of rank 1, a child of rank 0's."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    # Started by the engine's thread, whose children are listed apart.
    children += [
        child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    found = {int(child) for child in children if "ranks.follower" in Path(f"/proc/{child}/cmdline").read_text()}
    assert len(found) == 1, children
    return found.pop()
