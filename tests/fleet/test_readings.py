"""A reading of a fleet is answered once, also where it is ended before a replica has it."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_server.engine.messages.control import Release, ResetPrefixCache
from rollout_server.engine.messages.rollouts import Event, RequestFailed
from rollout_server.engine.messages.scoring import Classify, HoldScorer, LetScorerGo, Score, ScorerHeld
from rollout_server.errors import EngineUnavailable
from rollout_server.fleet.ledger.ledger import MOST_DEATHS, Ledger
from rollout_server.fleet.ledger.prefixes import hashes
from rollout_server.fleet.ledger.records import End, Work
from rollout_server.fleet.readings import FleetReadings
from rollout_server.rollout import PolicyAddress, PolicyVersion

BASE = PolicyAddress("base")


class Pinning:
    """The fleet's versions, as far as a reading asks for them."""

    def pinned(self, address: PolicyAddress) -> PolicyAddress:
        return address

    def labelled(self, version: PolicyVersion) -> PolicyVersion:
        return version

    def hold(self, version: PolicyVersion, rows: int) -> bool:
        return bool(version.number)


def readings_of(posted: list[Event], sent: list[Any], ledger: Ledger | None = None) -> FleetReadings:
    def send(id: str, message: Any) -> None:
        sent.append((id, message))

    return FleetReadings(ledger or Ledger(), Pinning(), posted.extend, send, lambda row: row)  # type: ignore[arg-type]


def classify(id: str) -> Classify:
    return Classify(id, BASE, ((1, 2),), ((1,),), held="h")


def kinds(sent: list[Any]) -> list[tuple[str, str]]:
    return [(id, type(message).__name__) for id, message in sent]


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


def test_a_replica_that_is_started_again_under_its_id_holds_the_scorer_anew() -> None:
    ledger, sent = Ledger(), list[Any]()
    ledger.join("a", 8, 0.0)
    readings = readings_of([], sent, ledger)
    readings.read(HoldScorer("h", "rows", BASE))
    readings.answered("a", ScorerHeld("h", PolicyVersion("base", 0, "sha256:0"), (None,)))
    readings.read(classify("c1"))
    assert kinds(sent) == [("a", "HoldScorer"), ("a", "Classify")]
    sent.clear()
    ledger.lost("a")
    readings.lost("a")
    ledger.remove("a")
    ledger.join("a", 8, 0.0)
    readings.place_waiting()
    readings.read(classify("c2"))
    assert kinds(sent) == [("a", "HoldScorer"), ("a", "Classify"), ("a", "Classify")]


def test_a_scorer_is_let_go_wherever_it_was_held() -> None:
    ledger, sent = Ledger(), list[Any]()
    ledger.join("a", 8, 0.0)
    readings = readings_of([], sent, ledger)
    readings.read(HoldScorer("h", "rows", BASE))
    readings.answered("a", ScorerHeld("h", PolicyVersion("base", 0, "sha256:0"), (None,)))
    ledger.join("b", 8, 0.0)
    ledger.drain("a")
    readings.read(classify("c"))
    readings.let_go(LetScorerGo("h"))
    assert kinds(sent) == [
        ("a", "HoldScorer"),
        ("b", "HoldScorer"),
        ("b", "Classify"),
        ("a", "LetScorerGo"),
        ("b", "LetScorerGo"),
    ]


def test_replicas_that_are_started_anew_one_by_one_are_no_reason_to_give_a_reading_up() -> None:
    posted: list[Event] = []
    ledger, sent = Ledger(), list[Any]()
    readings = readings_of(posted, sent, ledger)
    readings.read(Score("s", BASE, ((1, 2),), (0,)))
    for _ in range(MOST_DEATHS + 1):
        ledger.join("a", 8, 0.0)
        readings.place_waiting()
        ledger.drain("a")
        assert [action for action in ledger.take() if isinstance(action, End)] == [], "it has to read first"
        ledger.lost("a")
        readings.lost("a")
        ledger.remove("a")
    assert posted == [] and len(sent) == MOST_DEATHS + 1


@pytest.mark.parametrize("order", [ResetPrefixCache("o"), Release("o")])
def test_prompts_are_sent_after_no_kv_that_was_freed_by_order(order: ResetPrefixCache | Release) -> None:
    ledger, prompt = Ledger(), tuple(range(64))
    ledger.join("a", 8, 0.0)
    ledger.submit(Work(0, "base", prompt, 1))
    blocks = hashes(("base", 0), prompt)
    assert ledger.replicas["a"].prefixes.length(blocks) == 64
    readings_of([], [], ledger).order(order)
    assert ledger.replicas["a"].prefixes.length(blocks) == 0
