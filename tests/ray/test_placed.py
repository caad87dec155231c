"""Replicas that Ray places are a fleet as any other: the same rows and versions, whatever becomes of a node."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from adapters.tensors import AdapterTensor
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.rollouts import RowFinished
from rollout_server.fleet.ray.connection import StoredVersions
from rollout_server.fleet.wire import StageVersion, link_codec
from rollout_server.grammar import Constraint, Grammar
from rollout_server.rollout import PolicyAddress, RolloutRequest, SamplingParams
from tests.support.fleet.kill_replicas import NAME, bundles, push
from tests.support.fleet.ray_nodes import (
    RayNodes,
    Running,
    actor_processes,
    engine_options,
    kill_one,
    placed_fleet,
    started,
)
from tests.support.live_server import until

PROMPTS = [(5, 9, 33), (44,), tuple(range(1, 41)), (7, 7, 7)]
SAMPLES = 6
Drawn = list[tuple[int, int, tuple[int, ...], str]]


class Both:
    """A fleet of two in the cluster, and one engine of the same model in this process."""

    def __init__(self, running: Running, fleet: EngineHandle, one: EngineHandle) -> None:
        self._running = running
        self.fleet, self.one = fleet, one

    def push(self, seed: int) -> None:
        for handle in (self.fleet, self.one):
            self._running.run(push(handle, bundles(handle)[seed]))

    def rows_are_the_same(self, policy: str, tokens: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        asked = self._running.begin(drawn(self.fleet, policy, tokens))
        meanwhile()
        found = asked.result(300)
        assert found == self._running.run(drawn(self.one, policy, tokens))
        assert [(prompt, sample) for prompt, sample, *_ in found] == [(p, s) for p in range(4) for s in range(SAMPLES)]
        assert {len(ids) for _, _, ids, _ in found} == {tokens}

    def live(self) -> int:
        return sum(replica.state == "live" for replica in self.fleet.status.replicas)

    def restarts(self) -> int:
        return sum(replica.restarts for replica in self.fleet.status.replicas)


async def drawn(handle: EngineHandle, policy: str, tokens: int) -> Drawn:
    """Every row of a request: prompt, sample, token ids, and the digest of the version it is of."""
    id, sampling = handle.new_id("test"), SamplingParams(max_tokens=tokens, ignore_eos=True)
    address, seeds = PolicyAddress.parse(policy), tuple(range(SAMPLES))
    groups = [
        RolloutRequest(id, prompt, sampling, address, SAMPLES, index, tuple(9 * index + seed for seed in seeds))
        for index, prompt in enumerate(PROMPTS)
    ]
    rows = [event.rollout async for event in handle.submit(id, groups) if isinstance(event, RowFinished)]
    return sorted((row.prompt_index, row.sample_index, row.token_ids, row.spans[0].version.digest) for row in rows)


@pytest.fixture
def both(nodes: RayNodes, running: Running, path: Path) -> Iterator[Both]:
    fleet = placed_fleet(nodes.address, path, 2, silent_s=5.0)
    one = EngineHandle(engine_options(path))
    with started(running, fleet, one):
        yield Both(running, fleet, one)


def test_rows_and_versions_are_those_of_one_engine(both: Both) -> None:
    assert both.fleet.info == replace(both.one.info, kv_memory=both.fleet.info.kv_memory)
    both.rows_are_the_same("base", 12)
    for seed in (0, 1):
        both.push(seed)
        both.rows_are_the_same(NAME, 12)
    both.rows_are_the_same(f"{NAME}@1", 12)
    assert [(replica.state, replica.versions_staged, replica.pid) for replica in both.fleet.status.replicas] == [
        ("live", 2, None)
    ] * 2


def test_an_engine_that_is_killed_is_started_again_and_none_of_its_rows_is_lost(both: Both) -> None:
    both.push(2)
    both.rows_are_the_same(NAME, 400, kill_one)
    until(lambda: both.restarts() == 1 and both.live() == 2)
    assert {replica.versions_staged for replica in both.fleet.status.replicas} == {1}
    both.rows_are_the_same(NAME, 12)


def test_an_engine_that_hangs_is_ended_by_ray_and_its_rows_come_from_another(both: Both) -> None:
    def hang() -> None:
        os.kill(actor_processes()[0], signal.SIGSTOP)

    both.push(3)
    both.rows_are_the_same(NAME, 400, hang)
    until(lambda: both.restarts() == 1 and both.live() == 2)
    both.rows_are_the_same(NAME, 12)


def test_a_replica_whose_node_is_gone_is_placed_on_a_spare_node(both: Both, nodes: RayNodes) -> None:
    both.push(4)
    nodes.add()
    both.rows_are_the_same(NAME, 400, lambda: nodes.kill(nodes.nodes.pop(0)))
    until(lambda: both.restarts() == 1 and both.live() == 2)
    both.rows_are_the_same(NAME, 12)


def free_store() -> float:
    """Bytes of all object stores that nothing takes; Ray counts them anew every now and then."""
    return float(ray.available_resources()["object_store_memory"])


def test_a_version_is_stored_once_for_all_nodes_and_freed_when_it_is_dropped(both: Both, running: Running) -> None:
    def no_grammar(grammar: Grammar) -> Constraint:
        raise NotImplementedError

    bundle, nbytes = bundles(both.fleet)[0], 20_000_000
    # What is small is kept in this process, and never in a store.
    large = AdapterTensor("F32", np.zeros((nbytes // 4, 1), np.float32))
    bundle = replace(bundle, tensors={**bundle.tensors, "large": large})
    message = StageVersion("/stage/1/p", "p", 1, bundle, None, "adapter", False)
    versions, before = StoredVersions(ray, link_codec(no_grammar)), free_store()

    async def twice() -> bool:
        return bool(await versions.reference(message) == await versions.reference(replace(message)))

    assert running.run(twice())
    until(lambda: before - free_store() >= nbytes)
    assert before - free_store() < 2 * nbytes
    versions.forget("p", None)
    until(lambda: free_store() == before)
