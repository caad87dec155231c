"""Turns what happened to rows into events, and makes sure every request gets exactly one terminal event."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rollout_server.engine.batch.joining import Joining
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.messages.rollouts import (
    Admitted,
    AwaitsVersion,
    Event,
    RequestDone,
    RequestFailed,
    RowFinished,
    TokensSampled,
)
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import OpenRequest, RequestQueue
from rollout_server.engine.requests.token_gaps import TokenGapCounter
from rollout_server.errors import NeverAdmitted, RolloutError
from rollout_server.rollout import FinishReason, PolicyVersion


class Reports:
    """Events of one turn, in order; `tell_admissions` as `EngineOptions` says."""

    def __init__(self, queue: RequestQueue, policies: PolicyTable, *, tell_admissions: bool = False) -> None:
        self._tell_admissions = tell_admissions
        self._queue = queue
        self._policies = policies
        self._events: list[Event] = []
        self._complete: list[Group] = []
        self._met: list[Group] = []
        """Groups of which enough samples have finished."""
        self.tokens = 0
        self.gaps = TokenGapCounter()

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def add(self, event: Event) -> None:
        self._events.append(event)

    @property
    def has_complete(self) -> bool:
        return bool(self._complete)

    def take_complete(self) -> list[Group]:
        """Groups whose last row ended and of which some row waits for its values under the base."""
        groups, self._complete = self._complete, []
        return [
            g for g in groups if g.unreferenced and self._open(g) and any(row.needs_reference for row in g.withheld)
        ]

    def _open(self, group: Group) -> bool:
        """A group that outlived its request has nobody to report to, even if the id was taken again."""
        open_request = self._queue.open_requests.get(group.request.id)
        return open_request is not None and group in open_request.members

    def admitted(self, group: Group, version: PolicyVersion) -> None:
        """The group has left the queue for the first time."""
        if self._tell_admissions:
            self.add(Admitted(group.request.id, group.request.prompt_index, version))

    def awaits_version(self, group: Group) -> None:
        """The group begins to wait for a version that is to be pushed."""
        if self._tell_admissions:
            self.add(AwaitsVersion(group.request.id, group.request.prompt_index))

    # ---- rows -----------------------------------------------------------------------------------------------------

    def progress(self, rows: Sequence[Row]) -> None:
        """Rows that were read: one new token each, or an error."""
        self.gaps.told(rows)
        for row in rows:
            request = row.group.request
            failed = row.error is not None
            if not failed:
                self.tokens += 1
            if request.wants.tokens_as_they_come and not failed:
                self.add(
                    TokensSampled(
                        request.id,
                        request.prompt_index,
                        row.sample_index,
                        row.version,
                        (row.token_ids[-1],),
                        (row.logprobs[-1],),
                        (row.sampling_logprobs[-1],),
                        (row.top_logprobs[-1] or (),) if row.top_logprobs else None,
                    )
                )
            if not row.running:
                self._finished(row)

    def ended(self, row: Row) -> None:
        """A row that was ended between two steps."""
        self._finished(row)

    def release(self, rows: Iterable[Row]) -> None:
        """Rows whose place is free: no dispatched step needs their version any more."""
        for row in rows:
            self._policies.release(row.version, 1)
            self.let_go(row)

    def let_go(self, row: Row) -> None:
        """Gives back the versions that were kept for a row while it was away."""
        while row.pinned_versions:
            self._policies.release(row.pinned_versions.pop(), 1)

    def prompt_scored(self, group: Group, logprobs: tuple[float | None, ...]) -> None:
        group.prompt_logprobs, group.unscored = logprobs, False
        self._let_go(group)

    def referred(self, group: Group) -> None:
        """The rows of a group have their values under the base."""
        group.unreferenced = False
        self._let_go(group)

    def _let_go(self, group: Group) -> None:
        """Reports the held rows that wait for nothing any more."""
        held, group.withheld = group.withheld, []
        for row in held:
            if row.waits:
                group.withheld.append(row)
            else:
                self._report(row)

    def _finished(self, row: Row) -> None:
        """Reports an ended row once, or holds it until the values it was promised are there."""
        group = row.group
        row.reported = True
        self.gaps.note()
        group.ended += 1
        if row.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            group.finished += 1
            if group.finished == group.request.return_when:
                self._met.append(group)
        if group.ended == group.request.n and group.unreferenced:
            self._complete.append(group)
        if row.waits:
            group.withheld.append(row)
        else:
            self._report(row)

    def _report(self, row: Row) -> None:
        if not self._open(row.group):
            return
        id = row.group.request.id
        open_request = self._queue.open_requests[id]
        open_request.produced = open_request.produced or row.sampled > 0
        open_request.error = open_request.error or row.error
        self.add(RowFinished(id, row.rollout()))
        if closed := self._queue.row_reported(id):
            self._close(closed)

    def _close(self, open_request: OpenRequest) -> None:
        if open_request.error is not None and not open_request.produced:
            self.add(RequestFailed(open_request.id, open_request.error))
        else:
            self.add(RequestDone(open_request.id))

    # ---- endings --------------------------------------------------------------------------------------------------

    def fail(self, id: str, error: RolloutError) -> None:
        """A request that ends as a whole; what it still had waiting is forgotten."""
        open_request = self._queue.open_requests.get(id)
        if open_request is not None:
            for group in open_request.groups:
                self._forget(group)
            self._queue.close(id)
        self.add(RequestFailed(id, error))

    def fail_group(self, group: Group, error: RolloutError) -> None:
        """One group cannot start or go on; its samples are reported as errors, the rest of the request goes on."""
        group.unscored = group.unreferenced = False
        for row in group.withheld:
            row.fail(error)
        self._let_go(group)
        # Those whose prompt is being read fail with it; their places are given back.
        first = group.admitted - group.joining
        group.cancelled = group.cancelled or bool(group.joining)
        self._forget(group)
        self._never_ran(group, range(first, group.request.n), error=error)

    def fail_rows(self, rows: list[Row], joining: list[Joining], error: RolloutError) -> None:
        """A step failed: the rows in the batch end as errors, keeping their tokens, and leave it."""
        for row in rows:
            if row.running:
                row.fail(error)
            if not row.reported:
                self._finished(row)
            self.release([row])
        for join in joining:
            self._forget(join.group)
            join.group.prompt, join.group.joining = None, 0
            self.drop([join])
            if not join.group.cancelled:
                self._never_ran(join.group, range(join.first_sample, join.group.request.n), error=error)

    def drop(self, joining: Iterable[Joining]) -> None:
        """Gives back the references of samples that never got a row."""
        for join in joining:
            if join.group.version is not None:
                self._policies.release(join.group.version, join.count)

    @property
    def begun(self) -> list[str]:
        """Ids of the requests of which some sample was admitted."""
        open_requests = self._queue.open_requests.values()
        return [
            open_request.id
            for open_request in open_requests
            if any(group.version is not None for group in open_request.groups)
        ]

    def has_tokens(self, id: str, rows: Iterable[Row]) -> bool:
        """Returns whether some row of a request, reported or among those that run, has sampled anything."""
        open_request = self._queue.open_requests[id]
        held = [row for group in open_request.groups for row in group.withheld]
        running = [row for row in rows if row.group.request.id == id]
        return open_request.produced or any(row.sampled for row in held + running)

    def end_request(self, id: str, reason: str, rows: Iterable[Row], joining: Iterable[Joining]) -> None:
        """`rows` and `joining` are all that run and all that are on their way."""
        open_request = self._queue.open_requests.get(id)
        if open_request is None:
            return
        started = any(group.version is not None for group in open_request.groups)
        if reason == "timeout" and not started:
            self.fail(id, NeverAdmitted("The request waited in the queue until its timeout_s was over."))
            return
        running = [row for row in rows if row.group.request.id == id and row.running]
        begun = {join.group: join for join in joining if join.group in open_request.members}
        for group in open_request.groups:
            group.unscored = group.unreferenced = False
            self._let_go(group)
        self._abort_rows(running, reason)
        for group in open_request.groups:
            self._abort_rest(group, begun.get(group), reason)

    @property
    def has_met(self) -> bool:
        """True if enough samples of some group have finished, so that `end_met` has something to do."""
        return bool(self._met)

    def end_met(self, rows: Collection[Row], joining: Collection[Joining]) -> None:
        """Aborts the samples that `return_when` does not wait for: those that run and those that have not begun."""
        met, self._met = self._met, []
        for group in filter(self._open, met):
            begun = next((join for join in joining if join.group is group), None)
            self._abort_rows([row for row in rows if row.group is group and row.running], "return_when")
            self._abort_rest(group, begun, "return_when")

    def _abort_rows(self, rows: Iterable[Row], reason: str) -> None:
        for row in rows:
            row.end(FinishReason.ABORTED, reason)
            self._finished(row)

    def _abort_rest(self, group: Group, joining: Joining | None, reason: str) -> None:
        """The samples of a group that have no row yet."""
        if group.cancelled:
            return
        first = joining.first_sample if joining is not None else group.admitted
        group.cancelled = joining is not None
        self._forget(group)
        self._never_ran(group, range(first, group.request.n), reason=reason)

    def _forget(self, group: Group) -> None:
        """Takes a group's waiting samples out of the queue and gives back their references."""
        dropped = self._queue.drop(group)
        if dropped and group.version is not None:
            self._policies.release(group.version, dropped)

    def _never_ran(
        self, group: Group, samples: range | list[int], *, reason: str | None = None, error: RolloutError | None = None
    ) -> None:
        """Reports samples that have no row."""
        for index in samples:
            row = Row(
                group, index, group.request.seeds[index], group.version or self._policies.base, group.placement, None
            )
            if error is not None:
                row.fail(error)
            else:
                row.end(FinishReason.ABORTED, reason)
            self._finished(row)
