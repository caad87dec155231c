"""KV memory at its limit: the newest rows step aside, and come back when there is room, with the tokens they had."""

from __future__ import annotations

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.recompute import RecomputeRun
from rollout_server.engine.batch.row import Row
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.requests.reports import Reports
from rollout_server.rollout import RECOMPUTED


class Preemption:
    """Decides who steps aside before a step, and who may come back; `ledger` says what fits."""

    def __init__(
        self,
        batches: Batches,
        policies: PolicyTable,
        reports: Reports,
        queue: RequestQueue,
        ledger: KVLedger,
    ) -> None:
        self._batches = batches
        self._policies = policies
        self._reports = reports
        self._queue = queue
        self._ledger = ledger
        self.count = 0
        """Preempted rows since the start."""

    def make_room(self) -> None:
        """Before a step: where the KV it needs is not there, prompts that are kept for samples that wait are dropped,
        then rows give theirs up, the newest first. The oldest row never does."""
        self.let_grow()
        if self._ledger.fits_after_step():
            return
        self._batches.drop_idle()
        if self._ledger.fits_after_step():
            return
        self._batches.settle_and_release()
        self._batches.shrink()
        if self._ledger.fits_after_step():
            return
        self._queue.drop_kept()
        if self._ledger.fits_after_step():
            return
        order = sorted(self._batches.kv_users, key=lambda user: user.age)
        staying = len(order)
        while staying > 1 and not self._ledger.fits(rows=self._batches.minimum_cells(order[:staying])):
            staying -= 1
        # The newest first, so that groups stand in the queue in their order again.
        for user in reversed(order[staying:]):
            if user.row is not None:
                self._hold(user.row)
                self._batches.evict(user.row)
                self.count += 1
            elif user.joining is not None:
                self._batches.unjoin(user.joining)
                self._queue.put_back(user.joining.group, user.joining.count)
        self._batches.shrink()

    def let_grow(self) -> None:
        """Before arrays may have to grow: they may grow by more than they need, where nobody waits for the room."""
        if not self._queue.crowded and not self._batches.preempted:
            # A quarter stays free for whoever comes, and for what is kept for later requests.
            self._batches.may_grow_to((self._ledger.left_for("rows") - self._batches.idle_cells) * 3 // 4)

    def resume(self) -> bool:
        """Lets preempted rows come back, the oldest first. Returns whether none is left."""
        if any(not row.running for row in self._batches.preempted):
            self._batches.settle_and_release()
        if self._queue.crowded and not self._batches.size:
            # Nothing that runs will make room for the head of the queue.
            self._queue.drop_kept()
        while self._batches.preempted:
            row = self._batches.preempted[0]
            batch_key = self._batches.key_for(row.placement.parameters, 1, row.offset + 1)
            needed = self._batches.cells(batch_key, 1, row.columns_soon)
            if not self._ledger.fits(wanted=True, rows=needed):
                self._queue.drop_kept()
            if not self._ledger.fits(wanted=True, rows=needed):
                return False
            self._batches.settle_and_release()
            if row.running:
                self._batches.recover(row, batch_key, self._recompute_runs(row))
        return True

    def preempt(self, row: Row) -> None:
        """Lets a row wait that there is no room for where it has to go, and that is in no batch any more."""
        self._hold(row)
        self._batches.preempt(row)
        self.count += 1

    # ---- under which versions its tokens were read ------------------------------------------------------------------

    def _hold(self, row: Row) -> None:
        """Keeps the versions that its tokens were read under, as far as they are there still. Where one is gone, all
        is read again under the version the row is on, and its next span says so."""
        group = row.group
        if not row.spans:
            return  # its prompt is read under the version it is on
        wanted = {span.version for span in row.spans[_fresh_from(row) :]}
        if not _fresh_from(row) and group.version:
            wanted.add(group.version)
        for version in wanted - {row.version, *row.pinned_versions}:
            if not self._policies.acquire_if_kept(version):
                self._reports.let_go(row)
                row.recomputed = True
                return
            row.pinned_versions.append(version)

    def _recompute_runs(self, row: Row) -> list[RecomputeRun]:
        """What of a row's tokens is read under which version, in their order."""
        if row.recomputed or not row.spans:
            return [(row.offset, row.placement, row.version)]
        group, request = row.group, row.group.request
        # Positions of spans count from the first token behind the prompt, a prefix included.
        before = len(request.prompt_ids) - 1
        runs = [
            (before + span.end, placement, span.version)
            for span, placement in zip(row.spans, row.placements, strict=True)
        ][_fresh_from(row) :]
        if _fresh_from(row):
            return runs
        return [(len(request.given_ids) - 1, group.placement, group.version or runs[0][2]), *runs]


def _fresh_from(row: Row) -> int:
    """The last span from which everything was read again; 0 if none was."""
    return max([at for at, span in enumerate(row.spans) if span.kv == RECOMPUTED], default=0)
