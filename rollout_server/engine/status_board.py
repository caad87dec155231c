"""What the event loop's side may know of the engine at any time: one snapshot, made in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.prefix_reuse import PrefixReuse
from rollout_server.engine.batch.row import Row
from rollout_server.engine.messages.control import RowSeen, RowsSeen
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.idle_memory import Memory
from rollout_server.engine.scheduling.pause import PauseState
from rollout_server.engine.scheduling.preemption import Preemption

ROWS_TOLD = 512
"""Rows that are told of one by one; a picture of more is no picture."""


class StatusBoard:
    """`show` replaces the snapshot and is thread-safe."""

    def __init__(
        self,
        show: Callable[[EngineStatus], None],
        requests: RequestQueue,
        batches: Batches,
        reports: Reports,
        policies: PolicyTable,
        preemption: Preemption,
        pause_state: PauseState,
        prefix_reuse: PrefixReuse,
        memory: Memory,
    ) -> None:
        self._show = show
        self._requests = requests
        self._batches = batches
        self._reports = reports
        self._policies = policies
        self._preemption = preemption
        self._pause_state = pause_state
        self._prefix_reuse = prefix_reuse
        self._memory = memory

    def show(self, state: str = "ready", fault: str | None = None) -> None:
        """Shows how things stand now."""
        batches, policies = self._batches, self._policies
        self._show(
            EngineStatus(
                state=state,
                fault=fault,
                waiting=self._requests.waiting_requests,
                waiting_rows=self._requests.waiting_rows,
                running=batches.size,
                preempted=len(batches.preempted),
                preemptions=self._preemption.count,
                policies=policies.snapshot(),
                steps=batches.steps,
                tokens=self._reports.tokens,
                gaps=self._reports.gaps.gaps,
                slot_bytes=policies.slot_bytes,
                set_bytes=policies.set_bytes,
                sets=len(policies.sets),
                prefix=self._prefix_reuse.status,
                paused=self._pause_state.mode,
                memory=self._memory.status(),
                pictures=self._memory.pictures,
            )
        )

    def rows(self, id: str) -> RowsSeen:
        """The rows of this moment, in answer to the command `id`."""
        preempted = set(self._batches.preempted)
        rows = [row for row in self._batches.rows if row.running]
        told = tuple(_seen(row, row in preempted) for row in rows[:ROWS_TOLD])
        return RowsSeen(id, told, len(rows), tuple(Counter(row.version for row in rows).items()))


def _seen(row: Row, preempted: bool) -> RowSeen:
    request = row.group.request
    most = request.sampling.max_tokens - len(request.prefix)
    return RowSeen(
        request.id, request.prompt_index, row.sample_index, row.version, row.sampled, most, preempted=preempted
    )
