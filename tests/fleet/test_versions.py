"""Replicas that are late with a phase of a push: fenced before anybody is told, and even again before they get rows."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from adapters.tensors import AdapterTensor
from rollout_server.engine.messages.versions import Publish, Published
from rollout_server.errors import BodyTooLarge, Conflict, EngineUnavailable, RolloutError
from rollout_server.fleet.ledger.ledger import FLIP_S, GIVE_UP_S, STAGE_S, Ledger
from rollout_server.fleet.ledger.records import Drop, Flip, ReplicaState, Settle, Stage
from rollout_server.fleet.versions import FleetVersions
from rollout_server.fleet.wire import FlipAlias, StageVersion
from rollout_server.rollout import PolicyVersion, Span
from tests.support import tiny_models

LAYERS = {"model.layers.0.self_attn.q_proj": (8, 8)}
TENSORS, CONFIG = tiny_models.random_adapter(LAYERS, 2, 0)
BUNDLE = read_bundle(save(TENSORS), CONFIG, layers=LAYERS)


class Two:
    """The versions of a fleet of two replicas, which answer when a test says so, on a clock that it moves."""

    def __init__(self, fewest: int) -> None:
        self.now, self.sent, self.ledger = 0.0, list[tuple[str, Any]](), Ledger()
        self.versions = FleetVersions(self.ledger, self.send, self.act, 8, fewest, lambda: self.now)
        for id in ("quick", "slow"):
            self.ledger.join(id, 8, self.now)

    def send(self, id: str, message: Any) -> None:
        self.sent.append((id, message))

    def act(self) -> None:
        for action in self.ledger.take():
            match action:
                case Stage(id, version):
                    self.versions.stage_on(id, version)
                case Flip(id, version):
                    self.versions.flip_on(id, version)
                case Drop(id, version):
                    self.versions.drop_on(id, version)
                case Settle(change):
                    self.versions.settled(change)

    async def answer(self, id: str) -> None:
        """Has a replica do what it was told."""
        await asyncio.sleep(0)
        for message in [message for to, message in self.sent if to == id]:
            self.sent.remove((id, message))
            self.does(id, message)
        await asyncio.sleep(0)

    def does(self, id: str, message: Any, refuses: RolloutError | None = None) -> None:
        """What a replica was told is done, or refused, and that is heard of."""
        if isinstance(message, FlipAlias):
            self.ledger.flipped(id, (message.name, message.number))
        elif isinstance(message, StageVersion) and (at := self.versions.staging_of(message.id)) is not None:
            version = PolicyVersion(*at, message.bundle.digest)
            if refuses is not None:
                assert self.versions.refused(id, at, refuses)
            else:
                self.versions.staged_on(id, at, Published(message.id, version, False, False, 1.0, 0.0))
        self.act()

    async def staging(self) -> dict[str, StageVersion]:
        """What replicas are told to stage, which they have not answered."""
        await asyncio.sleep(0)
        told = {id: message for id, message in self.sent if isinstance(message, StageVersion)}
        self.sent = [each for each in self.sent if each[1] not in told.values()]
        return told

    async def passes(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds
        for id in self.ledger.replicas:
            self.ledger.heard(id, self.now)
        self.ledger.tick(self.now)
        self.act()
        await asyncio.sleep(0)

    def push(self, bundle: AdapterBundle = BUNDLE, label: str | None = None) -> asyncio.Task[Any]:
        return asyncio.create_task(self.versions.change(Publish("p", "trained", bundle, label=label)))

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        return tuple(replica.state for replica in self.ledger.replicas.values())


BOTH = (ReplicaState.LIVE, ReplicaState.LIVE)
ONE = (ReplicaState.LIVE, ReplicaState.FENCED)


def played(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 60))


def test_whoever_is_slow_to_stage_is_fenced_and_the_push_goes_on() -> None:
    async def scene() -> None:
        fleet = Two(fewest=1)
        pushing = fleet.push()
        await fleet.answer("quick")
        await fleet.passes(STAGE_S - 1.0)
        assert not pushing.done() and fleet.states == BOTH
        await fleet.passes(2.0)
        assert fleet.states == ONE
        await fleet.answer("quick")
        assert (await pushing).version.number == 1
        await fleet.answer("slow")
        await fleet.answer("slow")
        assert fleet.states == BOTH

    played(scene())


def test_where_too_few_have_staged_it_the_alias_does_not_move() -> None:
    async def scene() -> None:
        fleet = Two(fewest=2)
        pushing = fleet.push()
        await fleet.answer("quick")
        await fleet.passes(STAGE_S + 1.0)
        with pytest.raises(
            EngineUnavailable, match="1 replicas are live, and versions change where at least 2 are"
        ) as late:
            await pushing
        assert late.value.retryable and fleet.versions.snapshot() == ()
        # What it had staged is let go, and it is asked for anew.
        await fleet.answer("slow")
        await fleet.answer("quick")
        assert fleet.states == BOTH
        again = fleet.push()
        for _ in range(2):
            await fleet.answer("slow")
            await fleet.answer("quick")
        assert (await again).version.number == 1 and fleet.states == BOTH

    played(scene())


def test_a_push_that_no_replica_can_make_is_refused_and_later_ones_are_not_held_up() -> None:
    async def scene() -> None:
        fleet = Two(fewest=1)
        pushing, later = fleet.push(), fleet.push(label="later")
        await fleet.passes(STAGE_S + GIVE_UP_S - 1.0)
        assert not pushing.done() and fleet.states == BOTH
        await fleet.passes(2.0)
        with pytest.raises(EngineUnavailable, match="0 replicas are live"):
            await pushing
        assert fleet.versions.snapshot() == ()
        with pytest.raises(EngineUnavailable):
            await later
        # They are started anew.
        for id in ("quick", "slow"):
            fleet.ledger.lost(id)
            fleet.ledger.remove(id)
            fleet.ledger.join(id, 8, fleet.now)
        pushing = fleet.push()
        for _ in range(2):
            await fleet.answer("slow")
            await fleet.answer("quick")
        assert (await pushing).version.number == 1

    played(scene())


def test_whoever_does_not_answer_a_flip_is_fenced_before_the_push_is_told() -> None:
    async def scene() -> None:
        fleet = Two(fewest=1)
        pushing = fleet.push()
        await fleet.answer("quick")
        await fleet.answer("slow")
        await fleet.answer("quick")
        assert not pushing.done(), "one of them has flipped"
        await fleet.passes(FLIP_S + 0.5)
        assert fleet.states == ONE and (await pushing).live
        await fleet.answer("slow")
        assert fleet.states == BOTH

    played(scene())


def test_where_too_few_have_flipped_the_push_is_refused_and_its_retry_finds_it_done() -> None:
    async def scene() -> None:
        fleet = Two(fewest=2)
        pushing = fleet.push()
        await fleet.answer("quick")
        await fleet.answer("slow")
        await fleet.answer("quick")
        await fleet.passes(FLIP_S + 0.5)
        with pytest.raises(EngineUnavailable):
            await pushing
        (policy,) = fleet.versions.snapshot()
        assert policy.live is not None and policy.live.number == 1, "the alias has moved"
        await fleet.answer("slow")
        assert fleet.states == BOTH
        retried = await fleet.push()
        assert retried.unchanged and retried.live and retried.version.number == 1

    played(scene())


def test_a_version_that_fits_in_no_frame_is_refused_and_leaves_nothing() -> None:
    async def scene() -> None:
        fleet = Two(fewest=1)
        # It says that it has 4 GiB, and takes none.
        large = AdapterTensor("F32", np.broadcast_to(np.float32(0.0), (2**30, 1)))
        with pytest.raises(BodyTooLarge, match="has 4,294,9"):
            await fleet.push(replace(BUNDLE, tensors={**BUNDLE.tensors, "large": large}, digest="sha256:large"))
        assert fleet.sent == [] and fleet.ledger.kept == set() and fleet.versions.snapshot() == ()
        pushing = fleet.push()
        for _ in range(2):
            await fleet.answer("slow")
            await fleet.answer("quick")
        assert (await pushing).version.number == 1 and fleet.states == BOTH

    played(scene())


@pytest.mark.parametrize("when", ["before the next push", "while the next push is staged"])
def test_a_refusal_that_comes_late_is_of_its_own_push(when: str) -> None:
    """All replicas refuse what one of them does, and the number that nobody has is given to the next version."""

    async def scene() -> None:
        fleet = Two(fewest=1)
        refused = fleet.push()
        first = await fleet.staging()
        fleet.does("quick", first["quick"], Conflict("it does not fit"))
        with pytest.raises(Conflict, match="it does not fit"):
            await refused
        if when.startswith("before"):
            fleet.does("slow", first["slow"], Conflict("it does not fit"))
        pushing = fleet.push()
        second = await fleet.staging()
        fleet.does("slow", first["slow"], Conflict("it does not fit"))
        fleet.does("quick", second["quick"])
        assert not pushing.done() and ("trained", 1) not in fleet.ledger.replicas["slow"].held
        fleet.does("slow", second["slow"])
        await fleet.answer("quick")
        await fleet.answer("slow")
        assert (await pushing).version.number == 1 and fleet.states == BOTH

    played(scene())


def test_what_was_staged_for_a_push_that_was_refused_is_not_taken_for_the_next() -> None:
    async def scene() -> None:
        fleet = Two(fewest=1)
        refused = fleet.push()
        first = await fleet.staging()
        fleet.does("quick", first["quick"], Conflict("it has no room"))
        with pytest.raises(Conflict):
            await refused
        pushing = fleet.push()
        second = await fleet.staging()
        fleet.does("quick", second["quick"])
        fleet.does("slow", first["slow"])
        await fleet.answer("quick")
        assert not pushing.done() and fleet.ledger.replicas["slow"].held == set()
        fleet.does("slow", second["slow"])
        await fleet.answer("quick")
        await fleet.answer("slow")
        assert (await pushing).version.number == 1

    played(scene())


def test_a_push_that_changes_only_the_label_has_rows_told_under_it() -> None:
    async def scene() -> None:
        fleet = Two(fewest=1)
        pushing = fleet.push(label="before")
        for _ in range(2):
            await fleet.answer("slow")
            await fleet.answer("quick")
        version = (await pushing).version
        assert version.label == "before" and fleet.versions.labelled(version) == version
        again = await fleet.push(label="after")
        assert again.unchanged and fleet.sent == [], "no replica is told"
        (span,) = fleet.versions.spans_labelled((Span(version, 0, 4),))
        assert span == Span(replace(version, label="after"), 0, 4)

    played(scene())
