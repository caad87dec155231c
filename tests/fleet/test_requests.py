"""A request of a fleet is one request, however many replicas its groups are on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rollout_server.engine.messages.control import Abort, RowSeen
from rollout_server.engine.messages.rollouts import Admitted, Event, RequestDone, RowFinished, Submit
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import Dispatch, Lose
from rollout_server.fleet.requests import FleetRequests
from rollout_server.fleet.versions import FleetVersions
from rollout_server.rollout import FinishReason, PolicyAddress, PolicyVersion, RolloutRequest, SamplingParams

BASE = PolicyVersion("base", 0, "sha256:0")


class Asked:
    """Requests of a fleet of one replica, which has room for one group of two."""

    def __init__(self) -> None:
        self.posted, self.sent, self.ledger = list[Event](), list[Any](), Ledger()
        versions = FleetVersions(self.ledger, self.send, self.act, 8, 1, lambda: 0.0)
        versions.base = BASE
        self.requests = FleetRequests(self.ledger, versions, self.posted.extend, self.send, lambda: 0.0)
        self.ledger.join("one", 2, 0.0)

    def send(self, id: str, message: Any) -> None:
        self.sent.append(message)

    def act(self) -> None:
        for action in self.ledger.take():
            match action:
                case Dispatch(attempt):
                    self.requests.dispatch(attempt)
                case Lose(work, samples, reason):
                    self.requests.lose(work, samples, reason)

    def submit(self, id: str, groups: int) -> None:
        sampling, address = SamplingParams(max_tokens=4), PolicyAddress("base")
        asked = (RolloutRequest(id, (1, index), sampling, address, 2, index, (7, 8)) for index in range(groups))
        self.requests.submit(Submit(id, tuple(asked)))
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
