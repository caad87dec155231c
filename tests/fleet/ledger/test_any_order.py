"""The ledger under events in any order: every sample is somewhere, told once, and never under what is too old."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import (
    Action,
    Attempt,
    Dispatch,
    Drop,
    Flip,
    Lose,
    ReplicaState,
    Settle,
    Stage,
    Version,
    Work,
)


class AnyOrder(RuleBasedStateMachine):
    """Three replicas that answer when hypothesis says so."""

    works = Bundle("works")

    @initialize()
    def begin(self) -> None:
        self.ledger, self.now, self.number, self.acknowledged = Ledger(), 0.0, 0, 0
        self.sent: dict[str, list[Action]] = {}
        self.attempts: list[Attempt] = []
        self.told: dict[tuple[int, int], int] = {}
        self.all: list[Work] = []
        self.began: dict[Work, Version] = {}
        self.flips: dict[int, Version] = {}
        for index in range(3):
            self.join(f"r{index}")

    def join(self, id: str) -> None:
        self.sent[id] = []
        self.ledger.join(id, 4, self.now)
        self.act()

    def act(self) -> None:
        for action in self.ledger.take():
            match action:
                case Dispatch(attempt):
                    replica = self.ledger.replicas[attempt.replica]
                    assert replica.state is ReplicaState.LIVE
                    assert replica.live.get("trained", 0) >= self.acknowledged
                    if attempt.work in self.began and not attempt.work.switches:
                        assert attempt.pinned == self.began[attempt.work], "all of a group is of one version"
                    self.attempts.append(attempt)
                case Stage(id) | Flip(id) | Drop(id):
                    self.sent[id].append(action)
                case Lose(lost, samples):
                    for sample in samples:
                        self.count(lost, sample)
                case Settle(change) if change in self.flips:
                    self.acknowledged = max(self.acknowledged, self.flips[change][1])
                    for replica in self.ledger.in_state(ReplicaState.LIVE):
                        assert replica.live.get("trained", 0) >= self.flips[change][1]

    def count(self, work: Work, sample: int) -> None:
        key = (int(str(work.key)), sample)
        self.told[key] = self.told.get(key, 0) + 1

    @rule(samples=st.integers(1, 3), switches=st.booleans())
    def submit(self, samples: int, switches: bool) -> None:
        self.all.append(Work(len(self.all), "trained", (len(self.all),), samples, switches=switches))
        self.ledger.submit(self.all[-1])
        self.act()

    @rule()
    def stage_and_flip(self) -> None:
        self.number += 1
        self.ledger.stage(("trained", self.number), 0, self.now)
        change = self.ledger.flip(("trained", self.number), self.now)
        self.flips[change] = ("trained", self.number)
        self.ledger.drop([("trained", self.number - 3)])
        self.act()

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.sent)))
        if self.sent[id]:
            match self.sent[id].pop(0):
                case Stage(_, version):
                    self.ledger.staged(id, version)
                case Flip(_, version):
                    self.ledger.flipped(id, version)
            self.act()

    @rule(data=st.data(), sample=st.integers(0, 2))
    def report(self, data: st.DataObject, sample: int) -> None:
        if self.attempts:
            attempt = data.draw(st.sampled_from(self.attempts))
            if self.ledger.row(attempt.number, sample):
                self.count(attempt.work, sample)
            if not attempt.missing:
                self.ledger.over(attempt.number)
            self.act()

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        if self.attempts:
            attempt = data.draw(st.sampled_from(self.attempts))
            live = self.ledger.replicas[attempt.replica].live.get("trained", 0)
            version = attempt.pinned or ("trained", live)
            if self.ledger.attempt(attempt.number) is attempt:
                self.began.setdefault(attempt.work, version)
            self.ledger.admitted(attempt.number, version)

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.sent)))
        self.ledger.lost(id)
        self.ledger.remove(id)
        self.act()
        self.join(id)

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]), heard=st.booleans())
    def time_passes(self, seconds: float, heard: bool) -> None:
        self.now += seconds
        for id in self.sent if heard else ():
            self.ledger.heard(id, self.now)
        self.ledger.tick(self.now)
        self.act()

    @invariant()
    def every_sample_is_somewhere_and_told_once(self) -> None:
        for work in getattr(self, "all", ()):
            told = {sample for (key, sample) in self.told if key == work.key}
            assert told | work.missing == set(range(work.samples)) and not told & work.missing
            places = (work.attempt is not None) + (work in self.ledger.waiting)
            assert places == bool(work.missing) or (places == 1 and not work.missing)
            if work.attempt is not None:
                assert self.ledger.replicas[work.attempt.replica].state is not ReplicaState.DEAD
        assert all(count == 1 for count in getattr(self, "told", {}).values())


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=40)
