"""Groups on their way from the queue into a batch: where there is room for them, and which version they start on."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.joining import BatchKey
from rollout_server.engine.batch.row import Group
from rollout_server.engine.blame import Blame
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.messages.versions import PolicyCommand
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scoring.tasks import ScoringTasks
from rollout_server.engine.sight.seen import View
from rollout_server.errors import RolloutError, StalePolicy
from rollout_server.text.pictures.picture import Picture


class AdmissionControl:
    """`changes` are the changes of versions that wait or are under way. `clock` is the one of deadlines, in
    seconds."""

    def __init__(
        self,
        policies: PolicyTable,
        batches: Batches,
        ledger: KVLedger,
        queue: RequestQueue,
        reports: Reports,
        tasks: ScoringTasks,
        changes: Collection[PolicyCommand],
        blame: Blame,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policies = policies
        self._batches = batches
        self._ledger = ledger
        self._queue = queue
        self._reports = reports
        self._tasks = tasks
        self._changes = changes
        self._blame = blame
        self._clock = clock

    @property
    def joining(self) -> int:
        """Rows whose prompt is being read."""
        return sum(joining.count for joining in self._batches.joining)

    @property
    def views(self) -> list[View]:
        """What is read next of prompts and of rows that come back, but what has its KV from before."""
        self._batches.look_up()
        prompts = [recovery.prompt for recovery in self._batches.recoveries]
        prompts += [joining.prompt for joining in self._batches.joining]
        return [(prompt.sight, prompt.prefilled, len(prompt.tokens) - prompt.prefilled) for prompt in prompts]

    def begin_turn(self, budget: TurnBudget, *, paused: bool) -> None:
        """Tells the budget what decodes, what joins, and what could."""
        batches, queue = self._batches, self._queue
        budget.begin(
            rows=max(1, batches.size - self.joining) if batches.active else 0,
            joining=self.joining,
            idle=0 if paused else queue.startable(batches.size),
            streamed=queue.streams > 0 and any(row.streamed for row in batches.rows),
        )

    def admit(self) -> None:
        """Lets groups join for as long as rows and KV memory allow."""
        while admission := self._queue.next_admission(self._batches.size, self._batch_with_room):
            group = admission.group
            if group.version is None and not self._take_version(group):
                if self._queue.heads(group):
                    break
                continue
            self._batches.settle_and_release()
            with self._blame(group):
                self._batches.join(admission)
            self._queue.admitted(admission)
            wanted = group.request.wants.prompt_logprobs and not group.unscored and group.prompt_logprobs is None
            if wanted and group.version is not None:
                self._tasks.score_prompt(group, group.version)

    def _batch_with_room(self, group: Group, count: int) -> BatchKey | None:
        """The batch in which so many samples of a group could start; None where KV memory has no room for them."""
        # A group that has no version yet starts on what its policy names now.
        known = group.placement if group.version is not None else self._policies.placement(group.address)
        batch_key = self._batches.key_for(known.parameters, count, len(group.request.given_ids))
        cells = self._batches.cells(batch_key, count, group.columns_soon)
        return batch_key if self._ledger.fits(wanted=True, rows=cells) else None

    def fail(self, fault: RolloutError) -> None:
        """Something failed: the group that was joining fails with it, and whoever was to be read and shows a picture
        that the tower failed at."""
        failed, pictures = self._blame.of(Group), self._blame.of(Picture)
        if pictures:
            failed += [each.group for each in self._batches.joining if _shows(each.group, pictures)]
        for group in failed:
            self._reports.fail_group(group, fault)
        for row in [recovery.row for recovery in self._batches.recoveries] if pictures else ():
            if row.running and _shows(row.group, pictures):
                row.fail(fault)
                self._reports.ended(row)

    def call_back(self) -> None:
        """Groups that wait for a version come back when it is there, and fail when their time is over."""
        self._queue.bring_back(
            lambda group: not self._policies.behind(group.request.policy, group.request.min_version or 0)
        )
        for group in self._queue.impatient(self._clock()):
            try:
                self._policies.require(group.request.policy, group.request.min_version or 0)
            except StalePolicy as error:
                self._reports.fail_group(group, error)

    def _take_version(self, group: Group) -> bool:
        """Gives a group the version its policy names now, one reference a sample. False if there is none: the group
        has failed or is held for a version, or heads the queue until a change that came before it is done."""
        request = group.request
        try:
            group.version, group.placement = self._policies.acquire(group.address, request.n, request.min_version)
        except RolloutError as error:
            if isinstance(error, StalePolicy) and error.retryable and request.wait_s:
                self._queue.hold_for_version(group, self._clock() + request.wait_s)
                self._reports.awaits_version(group)
            elif not any(change.name == request.policy.name for change in self._changes):
                self._reports.fail_group(group, error)
            return False
        group.admitted_at = self._clock()
        self._reports.admitted(group, group.version)
        return True


def _shows(group: Group, pictures: Collection[Picture]) -> bool:
    return group.sight is not None and group.sight.shows(pictures)
