"""What running rows do when the name they follow moves on: `on_update` and `max_staleness`."""

from __future__ import annotations

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.row import Row
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.preemption import Preemption
from rollout_server.rollout import BASE, FinishReason, OnUpdate


class VersionSwitcher:
    def __init__(self, policies: PolicyTable, batches: Batches, reports: Reports, preemption: Preemption) -> None:
        self._policies = policies
        self._batches = batches
        self._reports = reports
        self._preemption = preemption

    def follow(self, row: Row) -> None:
        """A row whose request follows a name that has moved on switches or ends, if it asked for that."""
        request = row.group.request
        if not row.running or request.policy.name == BASE:
            return
        alias = self._policies.alias(request.policy.name)
        if alias is None or alias == row.version.number or not self._policies.samples(request.policy.name):
            return
        stale = request.max_staleness is not None and alias - row.version.number > request.max_staleness
        # A pinned address stays where it is, but grows stale as any other.
        asked = request.on_update if request.policy.follows else OnUpdate.FINISH
        if asked is OnUpdate.SWITCH and row.evicted and not _reads_anew(row):
            return  # once it is back
        if asked is OnUpdate.SWITCH:
            self._switch(row)
        elif asked is OnUpdate.ABORT or stale:
            row.end(FinishReason.SUPERSEDED, f"{request.policy.name}@{alias}")
            self._reports.ended(row)

    def _switch(self, row: Row) -> None:
        """Its next token is of the version that is live now, over the KV it has."""
        address = row.group.request.policy
        parameters = self._policies.placement(address).parameters
        seated = True
        anew = _reads_anew(row)
        if anew:
            if row not in self._batches.preempted:
                self._batches.settle()
                self._batches.evict(row)
        elif parameters != row.placement.parameters:
            # It changes its batch, and what is in flight says where it stands.
            self._batches.settle()
            if not row.running:
                return
            seated = self._batches.move(row, parameters)
        old = row.version
        row.version, row.placement = self._policies.acquire(address, 1, None)
        row.switched = row.switched or not anew
        if not seated:
            self._preemption.preempt(row)
        # A step in flight may still read the old version's slot: it is written again only behind that step.
        self._policies.release(old, 1)


def _reads_anew(row: Row) -> bool:
    """A row that has no token yet of what it has read, or is about to read, reads it under the new version instead:
    its next span is of one version then, and can be drawn again."""
    return row.recomputed or row.dispatched == len(row.group.request.prefix)
