"""A request of a fleet is one request, however many replicas its groups are on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from safetensors.numpy import save

from adapters.formats.read import read_bundle
from adapters.placement import BASE_PLACEMENT
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.messages.control import Abort, RowSeen
from rollout_server.engine.messages.rollouts import (
    Admitted,
    AwaitsVersion,
    Event,
    RequestDone,
    RequestFailed,
    RowFinished,
    Submit,
    TokensSampled,
)
from rollout_server.engine.messages.versions import Activate, Publish, Published
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import Dispatch, Flip, Lose, Settle, Stage
from rollout_server.fleet.requests import FleetRequests
from rollout_server.fleet.versions import FleetVersions
from rollout_server.rollout import (
    FinishReason,
    OnUpdate,
    PolicyAddress,
    PolicyVersion,
    Rollout,
    RolloutRequest,
    SamplingParams,
)
from tests.support import tiny_models

LAYERS = {"model.layers.0.self_attn.q_proj": (8, 8)}
BASE = PolicyVersion("base", 0, "sha256:0")


def trained(number: int) -> PolicyVersion:
    return PolicyVersion("trained", number, f"sha256:{number}")


class Asked:
    """Requests of a fleet whose replicas have room for one group of two each, and make every change at once."""

    def __init__(self, *replicas: str) -> None:
        self.now, self.posted, self.sent, self.ledger = 0.0, list[Event](), list[Any](), Ledger()
        self.versions = FleetVersions(self.ledger, self.send, self.act, 8, 1, lambda: self.now)
        self.versions.base = BASE
        self.requests = FleetRequests(self.ledger, self.versions, self.posted.extend, self.send, lambda: self.now)
        for id in replicas or ("one",):
            self.ledger.join(id, 2, 0.0)

    def send(self, id: str, message: Any) -> None:
        self.sent.append(message)

    def act(self) -> None:
        while actions := self.ledger.take():
            for action in actions:
                match action:
                    case Dispatch(attempt):
                        self.requests.dispatch(attempt)
                    case Lose(work, samples, reason):
                        self.requests.lose(work, samples, reason)
                    case Stage(id, version):
                        told = PolicyVersion(*version, f"sha256:{version[1]}")
                        self.versions.staged_on(id, version, Published("s", told, False, False, 1.0, 0.0))
                    case Flip(id, version):
                        self.ledger.flipped(id, version)
                    case Settle(change):
                        self.versions.settled(change)

    def push(self, seed: int) -> None:
        """Publishes what differs with `seed`; bytes that a name had before are its version of then."""
        tensors, config = tiny_models.random_adapter(LAYERS, 2, seed)
        publish = Publish("p", "trained", read_bundle(save(tensors), config, layers=LAYERS))
        asyncio.run(self.versions.change(publish))

    def back_to(self, number: int) -> None:
        """Moves the alias to an older version."""
        asyncio.run(self.versions.change(Activate("a", "trained", number)))

    def submit(self, id: str, groups: int, policy: str = "base", n: int = 2, **more: Any) -> None:
        sampling, address, seeds = SamplingParams(max_tokens=4), PolicyAddress.parse(policy), (7, 8)[:n]
        asked = (RolloutRequest(id, (1, at), sampling, address, n, at, seeds, **more) for at in range(groups))
        self.requests.submit(Submit(id, tuple(asked)))
        self.act()

    def newest(self) -> Submit:
        """What a replica was sent last of work."""
        return next(message for message in reversed(self.sent) if isinstance(message, Submit))

    def admit(self, number: int) -> Submit:
        """What was sent last is admitted under a version of the trained policy."""
        told = self.newest()
        self.requests.event(int(told.id), Admitted(told.id, 0, trained(number)))
        return told

    def says(self, submit: Submit, version: int, *tokens: int) -> None:
        """The first row has these tokens, one after another."""
        at = PolicyVersion("trained", version, f"sha256:{version}")
        for token in tokens:
            self.requests.event(int(submit.id), TokensSampled(submit.id, 0, 0, at, (token,), (0.0,), (0.0,)))
        self.act()

    def over(self, submit: Submit, *rollouts: Rollout) -> None:
        for rollout in rollouts:
            self.requests.event(int(submit.id), RowFinished(submit.id, rollout))
        self.requests.event(int(submit.id), RequestDone(submit.id))
        self.act()

    def is_lost(self, id: str) -> bool:
        """Its only row was lost, and that is all that was said of it."""
        last = self.posted[-1]
        lost = isinstance(last, RequestFailed) and (last.id, last.error.code) == (id, "replica_lost")
        return lost and self.rows(id) == [(0, 0, FinishReason.ERROR, None)]

    def streamed(self) -> list[int]:
        return [id for event in self.posted if isinstance(event, TokensSampled) for id in event.token_ids]

    def dies(self, submit: Submit) -> None:
        """The replica ends that has this."""
        attempt = self.ledger.attempt(int(submit.id))
        assert attempt is not None
        self.ledger.lost(attempt.replica)
        self.act()

    def rows(self, id: str) -> list[tuple[int, int, FinishReason, Any]]:
        rows = [event.rollout for event in self.posted if isinstance(event, RowFinished) and event.id == id]
        return sorted((row.prompt_index, row.sample_index, row.finish_reason, row.stop_reason) for row in rows)


def test_a_pause_that_aborts_ends_all_groups_of_what_has_begun_and_leaves_the_rest() -> None:
    asked = Asked()
    asked.submit("begun", 3)
    asked.submit("later", 1)
    (first,) = asked.sent
    asked.requests.event(int(first.id), Admitted(first.id, 0, BASE))
    asked.sent.clear()
    asked.requests.pause()
    asked.act()
    assert asked.sent == [Abort((first.id,), "pause")]
    assert asked.rows("begun") == [
        (prompt, sample, FinishReason.ABORTED, "pause") for prompt in (1, 2) for sample in (0, 1)
    ]
    # Its replica says what it had of the first group, and that is all.
    asked.requests.event(int(first.id), RequestDone(first.id))
    asked.act()
    assert asked.rows("later") == [] and asked.requests.waiting == 1


def test_a_row_that_is_looked_at_is_told_as_its_request_knows_it() -> None:
    """Sample 0 has come, and its replica ended: what is left is sample 0 of an attempt, and sample 1 of the request."""
    asked = Asked()
    asked.submit("a", 1)
    (first,) = asked.sent
    number = int(first.id)
    attempt = asked.ledger.attempt(number)
    assert attempt is not None and asked.ledger.row(number, 0)
    asked.ledger.lost("one")
    asked.ledger.remove("one")
    asked.ledger.join("one", 2, 0.0)
    asked.act()
    seen = RowSeen(asked.sent[-1].id, 0, 0, BASE, 3, 4, preempted=False)
    assert asked.requests.seen(seen) == replace(seen, id="a", sample_index=1)
    assert asked.requests.seen(replace(seen, id=first.id)) is None, "nobody listens to the dead"


@pytest.mark.parametrize("on_update", list(OnUpdate))
def test_a_row_that_is_drawn_again_begins_on_its_version_and_follows_its_name(on_update: OnUpdate) -> None:
    asked = Asked("one", "two")
    asked.push(1)
    asked.submit("a", 1, "trained", on_update=on_update, min_version=1)
    first = asked.admit(1)
    assert first.begins_on is None and first.groups[0].min_version == 1
    asked.dies(first)
    again = asked.newest()
    assert again.id != first.id and again.begins_on == 1
    (group,) = again.groups
    assert group.policy.follows and group.on_update is on_update and group.min_version is None


def one_row(asked: Asked, **more: Any) -> Submit:
    asked.push(1)
    asked.submit("a", 1, "trained", n=1, **more)
    return asked.admit(1)


def test_a_request_whose_rows_have_come_ends_also_where_its_replica_did_not_say_so_any_more() -> None:
    asked = Asked("one", "two")
    first = one_row(asked)
    row = Row(Group(first.groups[0]), 0, 7, trained(1), BASE_PLACEMENT, None)
    row.end(FinishReason.LENGTH, None)
    asked.requests.event(int(first.id), RowFinished(first.id, row.rollout()))
    asked.dies(first)
    assert asked.newest() is first and asked.posted[-1] == RequestDone("a")


def test_tokens_that_are_drawn_again_are_handed_on_once() -> None:
    asked = Asked("one", "two")
    first = one_row(asked)
    asked.says(first, 1, 11, 12)
    asked.dies(first)
    again = asked.admit(1)
    asked.says(again, 1, 11, 12, 13)
    assert asked.streamed() == [11, 12, 13]


def test_a_streamed_row_that_has_gone_there_and_back_is_lost_with_its_replica() -> None:
    asked = Asked("one", "two")
    first = one_row(asked, on_update=OnUpdate.SWITCH)
    asked.says(first, 1, 11)
    asked.push(2)
    asked.says(first, 2, 22)
    asked.back_to(1)
    asked.dies(first)
    assert asked.newest() is first and asked.is_lost("a")


@pytest.mark.parametrize("told", [(), (11,)])
def test_a_streamed_row_whose_name_moves_while_it_is_drawn_again_is_lost(told: tuple[int, ...]) -> None:
    """Whoever read its tokens would have those of one version followed by others that were never behind them."""
    asked = Asked("one", "two")
    first = one_row(asked, on_update=OnUpdate.SWITCH)
    asked.says(first, 1, 11, 12)
    asked.dies(first)
    again = asked.admit(1)
    asked.says(again, 1, *told)
    asked.push(2)
    asked.says(again, 2, 22, 23, 24, 25)
    assert asked.streamed() == [11, 12] and len(asked.rows("a")) == 1
    assert asked.sent[-1] == Abort((again.id,), "elsewhere")
    asked.over(again)
    assert asked.is_lost("a")


@pytest.mark.parametrize(
    ("reason", "why"), [(FinishReason.SUPERSEDED, "trained@2"), (FinishReason.ABORTED, "aborted")], ids=str
)
def test_a_row_that_ends_before_it_was_where_it_had_been_is_lost(reason: FinishReason, why: str) -> None:
    """Fewer tokens than its reader has would contradict what was streamed."""
    asked = Asked("one", "two")
    first = one_row(asked, on_update=OnUpdate.ABORT)
    asked.says(first, 1, 11, 12)
    asked.dies(first)
    again = asked.admit(1)
    row = Row(Group(again.groups[0]), 0, 7, trained(1), BASE_PLACEMENT, None)
    row.end(reason, why)
    asked.over(again, row.rollout())
    assert asked.streamed() == [11, 12] and asked.is_lost("a")


def test_a_group_that_waits_for_a_version_waits_no_longer_because_it_went_elsewhere() -> None:
    asked = Asked("one", "two")
    asked.push(1)
    asked.submit("a", 1, "trained", min_version=2, wait_s=60.0)
    waited = []
    for seconds in (30.0, 29.0, 10.0):
        told = asked.newest()
        waited.append(told.groups[0].wait_s)
        if seconds < 30.0:
            # It may have been in its queue before, behind others: its turn had not come.
            asked.requests.event(int(told.id), AwaitsVersion(told.id, 0))
        asked.now += seconds
        attempt = asked.ledger.attempt(int(told.id))
        assert attempt is not None
        asked.ledger.fence(attempt.replica)
        asked.ledger.staged(attempt.replica, ("trained", 1))
        asked.act()
    assert waited == [60.0, 60.0, 31.0] and asked.newest().groups[0].wait_s == 21.0


def test_a_streamed_row_whose_request_is_aborted_while_nobody_draws_it_is_lost() -> None:
    asked = Asked("one")
    first = one_row(asked)
    asked.says(first, 1, 11, 12)
    asked.requests.abort("a", "aborted")
    asked.dies(first)
    asked.ledger.remove("one")
    asked.ledger.join("one", 2, 0.0)
    asked.act()
    assert asked.streamed() == [11, 12] and asked.is_lost("a")
