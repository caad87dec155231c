"""A reading of a fleet is answered once, also where it is ended before a replica has it."""

from __future__ import annotations

from typing import Any

from rollout_server.engine.messages.rollouts import Event, RequestFailed
from rollout_server.engine.messages.scoring import HoldScorer, LetScorerGo, Score
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.readings import FleetReadings
from rollout_server.rollout import PolicyAddress

BASE = PolicyAddress("base")


class Pinning:
    """The fleet's versions, as far as a reading asks for them."""

    def pinned(self, address: PolicyAddress) -> PolicyAddress:
        return address


def readings_of(posted: list[Event], sent: list[Any]) -> FleetReadings:
    return FleetReadings(Ledger(), Pinning(), posted.extend, lambda id, message: sent.append((id, message)))  # type: ignore[arg-type]


def test_an_ended_reading_is_answered_and_forgotten() -> None:
    posted: list[Event] = []
    readings = readings_of(posted, [])
    readings.read(Score("s", BASE, ((1, 2),), (0,)))
    readings.abort("s", "disconnect")
    (failed,) = posted
    assert isinstance(failed, RequestFailed) and isinstance(failed.error, EngineUnavailable)
    readings.abort("s", "disconnect")
    readings.place_waiting()
    assert posted == [failed]


def test_what_is_let_go_before_a_replica_holds_it_is_never_held() -> None:
    posted: list[Event] = []
    sent: list[Any] = []
    readings = readings_of(posted, sent)
    readings.read(HoldScorer("h", "rows", BASE))
    readings.let_go(LetScorerGo("h"))
    readings.place_waiting()
    assert posted == [] and sent == []
