"""In simulation, each of the ledger's rules is needed; together they lose nothing and let nothing old through."""

from __future__ import annotations

import pytest

from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import (
    Action,
    Attempt,
    Dispatch,
    Phase,
    Replica,
)
from tests.laws.grids import some_long
from tests.support.fleet.simulated import Fleet, Outcome

RESTLESS = {"die": 0.03, "cut": 0.05}


def run(make: type[Ledger], replicas: int = 8, groups: int = 800, seed: int = 0) -> Outcome:
    return Fleet(make, replicas, groups, seed, **RESTLESS).run()


@pytest.mark.parametrize("seed", some_long(range(4), 0))
def test_nothing_is_stale_lost_or_told_twice_while_replicas_die_and_links_are_cut(seed: int) -> None:
    outcome = run(Ledger, seed=seed)
    assert outcome.groups == 800 and outcome.redrawn and len(outcome.pushes) > 3, "it was not idle"
    assert (outcome.stale, outcome.unanswered, outcome.twice) == (0, 0, 0)


@pytest.mark.long
@pytest.mark.parametrize(("replicas", "groups", "seeds"), [(8, 5000, 8), (64, 10_000, 4), (256, 10_000, 3)])
def test_a_hundred_thousand_groups(replicas: int, groups: int, seeds: int) -> None:
    for seed in range(seeds):
        outcome = Fleet(Ledger, replicas, groups, seed, **RESTLESS).run()
        assert outcome.groups == groups
        assert (outcome.stale, outcome.unanswered, outcome.twice) == (0, 0, 0), seed


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


WITHOUT_ONE = [KeepsWhatIsFenced, ListensToAll, ServesBeforeItIsEven, AcknowledgesBeforeTheFlip]


@pytest.mark.parametrize("without", some_long(WITHOUT_ONE, AcknowledgesBeforeTheFlip, KeepsWhatIsFenced))
def test_without_one_rule_groups_run_under_old_versions(without: type[Ledger]) -> None:
    """Links are cut more often here: some rules matter only to what comes late."""
    runs = (Fleet(without, 16, 1200, seed, die=0.03, cut=0.3).run() for seed in range(40))
    assert any(outcome.stale for outcome in runs)


@pytest.mark.parametrize("without", some_long([DrawsNothingAgain, WaitsForTheSilent], DrawsNothingAgain))
def test_without_one_rule_groups_are_never_answered(without: type[Ledger]) -> None:
    runs = (Fleet(without, 8, 600, seed, die=0.03, cut=0.3).run() for seed in range(40))
    assert any(outcome.unanswered for outcome in runs)
