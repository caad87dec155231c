"""Versions that are kept for calls whose rows they score, so that all rows of a call meet the same one."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from adapters.placement import Placement
from rollout_server.engine.messages.scoring import HoldScorer, ScorerHeld
from rollout_server.engine.policies.scorers import Scorer
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.errors import EngineUnavailable
from rollout_server.rollout import PolicyVersion


@dataclass(frozen=True, slots=True, eq=False)
class HeldScorer:
    """A version with one reference of its own: a newer one, its deletion or retention change nothing about it."""

    owner: str
    version: PolicyVersion
    placement: Placement
    scorer: Scorer | None
    """None of an encoder, whose head is part of it."""
    elsewhere: bool = False
    """True where the rows run in another engine."""


class HeldScorers:
    """By the id of the command that asked for it."""

    def __init__(self, policies: PolicyTable, labels: tuple[str | None, ...] = ()) -> None:
        """`labels` are those of an encoder."""
        self._policies = policies
        self._labels = labels
        self._held: dict[str, HeldScorer] = {}

    def hold(self, command: HoldScorer) -> ScorerHeld:
        """Raises `UnknownPolicy`, `VersionGone`, or `InvalidField` where the policy scores nothing, holding nothing."""
        scorer = None if self._labels else self._policies.scorer(command.policy)
        version, placement = self._policies.acquire(command.policy, 1, None, reads=True)
        self._held[command.id] = HeldScorer(command.owner, version, placement, scorer, command.elsewhere)
        return ScorerHeld(command.id, version, scorer.labels if scorer else self._labels)

    def again(self, id: str) -> HeldScorer:
        """What is held under an id, with one more reference for whoever reads with it. Raises `EngineUnavailable` where
        it was let go."""
        if id not in self._held:
            raise EngineUnavailable("The reward model of this call was let go before the row was scored.")
        held = self._held[id]
        self._policies.acquire_again(held.version, 1)
        return held

    def let_go(self, id: str) -> None:
        """Gives the reference back; what reads with it has its own."""
        if held := self._held.pop(id, None):
            self._policies.release(held.version, 1)

    def outlive(self, open_requests: Container[str]) -> bool:
        """True where every row of some call has been reported, and rewards of it may still be asked for. Of rows that
        run elsewhere nobody knows here: a pause that waited for them might wait for rows that wait for its end."""
        return any(not held.elsewhere and held.owner not in open_requests for held in self._held.values())
