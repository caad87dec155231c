"""In simulation, each of the ledger's rules is needed; together they lose nothing and let nothing old through."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import (
    Action,
    Attempt,
    Dispatch,
    Phase,
    Replica,
    Version,
    Work,
)
from tests.laws.grids import some_long
from tests.support.fleet.simulated import Fleet, Outcome


@dataclass(frozen=True)
class Load:
    """How many groups come to how many replicas, and how often those die and are cut off."""

    replicas: int
    groups: int
    cut: float
    pushes: int
    """So many at least."""
    die: float = 0.03

    def run(self, make: type[Ledger], seed: int) -> Outcome:
        return Fleet(make, self.replicas, self.groups, seed, die=self.die, cut=self.cut).run()


RESTLESS, OFTEN_CUT = Load(8, 800, 0.05, 4), Load(16, 1200, 0.3, 2)
SEEDS = range(40)


def wrongs(outcome: Outcome) -> dict[str, int]:
    found = ("stale", "mixed", "unanswered", "twice")
    return {name: count for name in found if (count := getattr(outcome, name))}


@pytest.mark.parametrize("load", [RESTLESS, OFTEN_CUT])
@pytest.mark.parametrize("seed", some_long(range(4), 0))
def test_nothing_is_stale_lost_mixed_or_told_twice_while_replicas_die_and_links_are_cut(load: Load, seed: int) -> None:
    outcome = load.run(Ledger, seed)
    assert outcome.groups == load.groups and outcome.redrawn and len(outcome.pushes) >= load.pushes, "it was not idle"
    assert not wrongs(outcome)


@pytest.mark.long
@pytest.mark.parametrize(("replicas", "groups", "seeds"), [(8, 5000, 8), (64, 10_000, 4), (256, 10_000, 3)])
def test_a_hundred_thousand_groups(replicas: int, groups: int, seeds: int) -> None:
    for seed in range(seeds):
        outcome = replace(RESTLESS, replicas=replicas, groups=groups).run(Ledger, seed)
        assert outcome.groups == groups and not wrongs(outcome), seed


class KeepsWhatIsFenced(Ledger):
    """What a fenced replica has not admitted stays there."""

    def _take_back(self, replica: Replica) -> None:
        return


class ListensToAll(Ledger):
    """Rows of any attempt count."""

    def __init__(self) -> None:
        super().__init__()
        self.ever: dict[int, Attempt] = {}

    def take(self) -> list[Action]:
        actions = super().take()
        self.ever |= {action.attempt.number: action.attempt for action in actions if isinstance(action, Dispatch)}
        return actions

    def attempt(self, number: int) -> Attempt | None:
        return self.ever.get(number)


class ServesBeforeItIsEven(Ledger):
    """Replicas get rows as soon as they are there."""

    def _may_serve(self, replica: Replica) -> bool:
        return True


class AcknowledgesBeforeTheFlip(Ledger):
    """A push does not wait for aliases to move."""

    def _asked(self, phase: Phase) -> list[Replica]:
        return [] if phase == "flip" else super()._asked(phase)


class DrawsUnderTheNewest(Ledger):
    """Rows that are drawn again begin on what their policy names now."""

    def _pin(self, work: Work) -> Version | None:
        return None


class DrawsNothingAgain(Ledger):
    """Rows of a dead replica are left there."""

    def _draw_again(self, attempts: list[Attempt]) -> None:
        return


class WaitsForTheSilent(Ledger):
    """A replica that does not answer is not ended."""

    def tick(self, now: float) -> None:
        for replica in self.replicas.values():
            replica.heard_at = now
        super().tick(now)


WITHOUT_ONE = [
    (KeepsWhatIsFenced, "stale", RESTLESS),
    (ServesBeforeItIsEven, "stale", RESTLESS),
    (AcknowledgesBeforeTheFlip, "stale", RESTLESS),
    (ListensToAll, "mixed", RESTLESS),
    # It matters only to what comes late: links are cut more often here.
    (ListensToAll, "stale", OFTEN_CUT),
    (DrawsUnderTheNewest, "mixed", RESTLESS),
    (DrawsNothingAgain, "unanswered", RESTLESS),
    (WaitsForTheSilent, "unanswered", RESTLESS),
]


@pytest.mark.parametrize(("without", "wrong", "load"), some_long(WITHOUT_ONE, *WITHOUT_ONE[:3], *WITHOUT_ONE[5:7]))
def test_without_one_rule_something_goes_wrong_and_with_all_nothing(
    without: type[Ledger], wrong: str, load: Load
) -> None:
    """Both are seen on the same load and seed."""
    seed = next((seed for seed in SEEDS if wrong in wrongs(load.run(without, seed))), None)
    assert seed is not None and not wrongs(load.run(Ledger, seed))
