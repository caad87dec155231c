"""Requests of a fleet: their groups go to replicas one by one, and what comes back is one request's events again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from adapters.placement import BASE_PLACEMENT
from rollout_server.engine.batch.row import Group, Row
from rollout_server.engine.messages.control import Abort, RowSeen
from rollout_server.engine.messages.rollouts import (
    Admitted,
    AwaitsVersion,
    Event,
    RequestDone,
    RequestFailed,
    RowFinished,
    Submit,
    TokensSampled,
)
from rollout_server.errors import EngineUnavailable, NeverAdmitted, ReplicaLost, RolloutError
from rollout_server.fleet.ledger.ledger import Ledger
from rollout_server.fleet.ledger.records import Attempt, ReplicaState, Work
from rollout_server.fleet.versions import FleetVersions
from rollout_server.rollout import BASE, FinishReason, OnUpdate, PolicyVersion, Rollout, RolloutRequest

PAUSE = "pause"
"""The stop reason of rows that a pause ends."""


@dataclass(slots=True, eq=False)
class OpenGroup:
    """One prompt of a request, wherever it is."""

    request: RolloutRequest
    work: Work
    finished: int = 0
    """Samples that have stopped or reached their length, for `return_when`."""
    ended: str | None = None
    """Why the rest of it is not wanted any more."""
    error: RolloutError | None = None
    """Why samples of it have no rows."""
    rowless: tuple[int, ...] = ()
    held: PolicyVersion | None = None
    """The version that is kept for it."""
    waits_until: float | None = None
    """When its `wait_s` is over, once it has begun to wait for a version, wherever it goes on waiting."""
    streamed: Counter[int] = field(default_factory=Counter)
    """Tokens of each sample that were handed on."""
    seen: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Tokens of each attempt and sample that came."""


@dataclass(slots=True, eq=False)
class OpenRequest:
    id: str
    deadline: float | None
    groups: list[OpenGroup] = field(default_factory=list)
    open_groups: int = 0
    begun: bool = False
    """Some group was admitted."""
    produced: bool = False
    """Some row has a token, so the reply is a list of rows and not an error."""
    reported: bool = False
    error: RolloutError | None = None


class FleetRequests:
    """Belongs to the event loop. `post` carries events to whoever asked, `send` a message to a replica; `clock` is the
    one of deadlines."""

    def __init__(
        self,
        ledger: Ledger,
        versions: FleetVersions,
        post: Callable[[list[Event]], None],
        send: Callable[[str, Any], None],
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._versions = versions
        self._post = post
        self._send = send
        self._clock = clock
        self._open: dict[str, OpenRequest] = {}
        self._groups: dict[Work, tuple[OpenRequest, OpenGroup]] = {}

    @property
    def waiting(self) -> int:
        """Requests of which no group was admitted yet."""
        return sum(not request.begun for request in self._open.values())

    def submit(self, submit: Submit) -> None:
        try:
            for request in submit.groups:
                self._versions.check(request.policy)
        except RolloutError as error:
            self._post([RequestFailed(submit.id, error)])
            return
        opened = self._open[submit.id] = OpenRequest(submit.id, submit.deadline, open_groups=len(submit.groups))
        for index, request in enumerate(submit.groups):
            work = Work(
                (submit.id, index),
                request.policy.name,
                request.given_ids,
                request.n,
                None if request.policy.follows else self._versions.pinned(request.policy).number,
                waits=request.min_version is not None and request.wait_s is not None,
                switches=request.on_update is OnUpdate.SWITCH,
            )
            group = OpenGroup(request, work)
            opened.groups.append(group)
            self._groups[work] = (opened, group)
        self._ledger.submit(*(group.work for group in opened.groups))

    def abort(self, id: str, reason: str) -> None:
        """Ends what is left of a request; its rows are reported with what they have."""
        opened = self._open.get(id)
        for group in opened.groups if opened else ():
            if group.work.missing and group.ended is None:
                group.ended = reason
                if group.work.attempt is not None:
                    attempt = group.work.attempt
                    self._send(attempt.replica, Abort((str(attempt.number),), reason))
                else:
                    self._ledger.abort(group.work)

    def pause(self) -> None:
        """Ends the requests that have begun, with all of their groups: replicas know only of their own."""
        for opened in list(self._open.values()):
            if opened.begun:
                self.abort(opened.id, PAUSE)

    def tick(self, now: float) -> None:
        """Ends what still waits here after its deadline; replicas see to what they have."""
        for opened in list(self._open.values()):
            if opened.deadline is None or opened.deadline > now:
                continue
            for group in opened.groups:
                if group.work.missing and group.work.attempt is None:
                    group.ended = group.ended or "timeout"
                    self._ledger.abort(group.work)

    def stop(self) -> None:
        """Requests of which some row has tokens are answered with what there is; the others have nothing."""
        for opened in [opened for opened in self._open.values() if opened.produced]:
            for group in [group for group in opened.groups if group.work.missing]:
                group.ended = group.ended or "stopping"
                self.lose(group.work, tuple(sorted(group.work.missing)), "stopping")

    def seen(self, row: RowSeen) -> RowSeen | None:
        """A row as its request knows it, where a replica knows an attempt; None if that is not listened to any more."""
        attempt = self._ledger.attempt(int(row.id))
        if attempt is None:
            return None
        opened, _ = self._groups[attempt.work]
        version = self._versions.labelled(row.version)
        return replace(row, id=opened.id, sample_index=attempt.samples[row.sample_index], version=version)

    # ---- to replicas ------------------------------------------------------------------------------------------------

    def dispatch(self, attempt: Attempt) -> None:
        """Sends a group, or what is missing of it, to the replica that the ledger chose."""
        _, group = self._groups[attempt.work]
        if group.ended is not None:
            # Aborted, and its replica ended before it could say what it had.
            self._ledger.over(attempt.number)
            self.lose(attempt.work, attempt.samples, "aborted")
            return
        request, id = group.request, str(attempt.number)
        left = None if request.return_when is None else max(1, request.return_when - group.finished)
        begins_on = None if attempt.pinned is None or request.policy.name == BASE else attempt.pinned[1]
        opened, _ = self._groups[attempt.work]
        part = replace(
            request,
            id=id,
            n=len(attempt.samples),
            seeds=tuple(request.seeds[sample] for sample in attempt.samples),
            return_when=None if left is None else min(left, len(attempt.samples)),
            min_version=request.min_version if begins_on is None else None,
            wait_s=request.wait_s if group.waits_until is None else max(0.0, group.waits_until - self._clock()),
        )
        seconds = None if opened.deadline is None else max(0.0, opened.deadline - self._clock())
        self._send(attempt.replica, Submit(id, (part,), seconds, begins_on))

    def lose(self, work: Work, samples: tuple[int, ...], reason: str) -> None:
        """Samples that no replica will report."""
        opened, group = self._groups[work]
        work.missing.difference_update(samples)
        if samples and group.ended == "timeout" and work.admitted is None and not opened.reported:
            group.error, group.rowless = self._never_admitted(), samples
        elif group.ended is not None:
            # Nobody can say any more what was handed on of a row.
            seen = tuple(sample for sample in samples if group.streamed[sample])
            unseen = tuple(sample for sample in samples if not group.streamed[sample])
            self._report(opened, group, self._unsampled(group, unseen, reason=group.ended))
            if seen:
                self._report_lost(opened, group, seen, "its request ended before it had been drawn again")
        elif samples:
            self._report_lost(opened, group, samples, reason)
        self._close_group(opened, group)

    def _report_lost(self, opened: OpenRequest, group: OpenGroup, samples: tuple[int, ...], reason: str) -> None:
        error = ReplicaLost(f"The row was lost: {reason}.")
        opened.error = opened.error or error
        self._report(opened, group, self._unsampled(group, samples, error=error))

    def _never_admitted(self) -> RolloutError:
        if not self._ledger.in_state(ReplicaState.LIVE):
            return EngineUnavailable("No replica became live until the request's timeout_s was over; try again.")
        return NeverAdmitted("The request waited in the queue until its timeout_s was over.")

    # ---- from replicas ----------------------------------------------------------------------------------------------

    def event(self, number: int, event: Event) -> None:
        """What a replica says of an attempt; older attempts are not listened to."""
        attempt = self._ledger.attempt(number)
        if attempt is None:
            return
        opened, group = self._groups[attempt.work]
        match event:
            case Admitted(version=version):
                opened.begun = True
                version = self._versions.labelled(version)
                self._ledger.admitted(number, (version.name, version.number))
                if group.held is None and self._versions.hold(version, len(attempt.missing)):
                    group.held = version
            case AwaitsVersion():
                if group.waits_until is None:
                    group.waits_until = self._clock() + (group.request.wait_s or 0.0)
            case TokensSampled():
                self._stream(opened, group, attempt, event)
            case RowFinished(rollout=rollout):
                sample = attempt.samples[rollout.sample_index]
                fewer = rollout.sampled < group.streamed[sample]
                if fewer and rollout.finish_reason is not FinishReason.ERROR:
                    self._lose_seen(opened, group, attempt, sample)
                elif self._ledger.row(number, sample):
                    spans = self._versions.spans_labelled(rollout.spans)
                    told = replace(rollout, sample_index=sample, sampling=group.request.sampling, spans=spans)
                    self._report(opened, group, [told])
                if rollout.finish_reason is FinishReason.ABORTED and rollout.stop_reason == PAUSE:
                    # It was admitted there a moment before the pause came, and here that was not known yet.
                    self.abort(opened.id, PAUSE)
            case RequestDone() | RequestFailed():
                left = tuple(sorted(attempt.missing))
                if isinstance(event, RequestFailed):
                    opened.error = opened.error or event.error
                    group.error, group.rowless = (event.error, left) if left else (None, ())
                attempt.work.missing.difference_update(left)
                self._ledger.over(number)
                self._close_group(opened, group)

    def _stream(self, opened: OpenRequest, group: OpenGroup, attempt: Attempt, event: TokensSampled) -> None:
        """A row that is drawn again says once more what was handed on already, which has to be of the same version."""
        sample = attempt.samples[event.sample_index]
        at = group.seen[attempt.number, sample] = group.seen[attempt.number, sample] + len(event.token_ids)
        shown = group.work.shown.get(sample, set())
        if at <= group.streamed[sample] and event.version.number not in shown:
            self._lose_seen(opened, group, attempt, sample)
        elif at > group.streamed[sample] and sample in attempt.missing:
            group.streamed[sample] = at
            group.work.shown[sample] = shown | {event.version.number}
            version = self._versions.labelled(event.version)
            self._post([replace(event, id=opened.id, sample_index=sample, version=version)])

    def _lose_seen(self, opened: OpenRequest, group: OpenGroup, attempt: Attempt, sample: int) -> None:
        """A row that is drawn again does not begin with what was handed on of it."""
        if self._ledger.row(attempt.number, sample):
            self._report_lost(
                opened, group, (sample,), "its name moved on, or its request ended, before it had been drawn again"
            )
            if not attempt.missing:
                self._send(attempt.replica, Abort((str(attempt.number),), "elsewhere"))

    # ---- reports ----------------------------------------------------------------------------------------------------

    def _report(self, opened: OpenRequest, group: OpenGroup, rows: list[Rollout]) -> None:
        for row in rows:
            opened.reported = True
            opened.produced = opened.produced or row.sampled > 0
            group.finished += row.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            if group.held is not None:
                self._versions.let_go(group.held, 1)
        self._post([RowFinished(opened.id, row) for row in rows])

    def _close_group(self, opened: OpenRequest, group: OpenGroup) -> None:
        if group.work not in self._groups or group.work.missing:
            return
        del self._groups[group.work]
        opened.open_groups -= 1
        if not opened.open_groups:
            self._close(opened)

    def _close(self, opened: OpenRequest) -> None:
        """One terminal event. Groups without rows end the request with their error, unless others have some."""
        del self._open[opened.id]
        bare = [group for group in opened.groups if group.error is not None]
        if bare and not opened.reported:
            for group in bare:
                if group.held is not None:
                    self._versions.let_go(group.held, len(group.rowless))
            self._post([RequestFailed(opened.id, error) for error in [bare[0].error] if error])
            return
        for group in bare:
            late = isinstance(group.error, NeverAdmitted | EngineUnavailable)
            rows = self._unsampled(group, group.rowless, reason="timeout") if late else []
            self._report(opened, group, rows or self._unsampled(group, group.rowless, error=group.error))
        if opened.error is not None and not opened.produced:
            self._post([RequestFailed(opened.id, opened.error)])
        else:
            self._post([RequestDone(opened.id)])

    def _unsampled(
        self,
        group: OpenGroup,
        samples: tuple[int, ...],
        *,
        reason: str | None = None,
        error: RolloutError | None = None,
    ) -> list[Rollout]:
        """Rows that no engine will report."""
        version = group.held or self._versions.base
        rows = []
        for sample in samples:
            own = Group(group.request)
            row = Row(own, sample, group.request.seeds[sample], version, BASE_PLACEMENT, None)
            if error is not None:
                row.fail(error)
            else:
                row.end(FinishReason.ABORTED, reason)
            rows.append(row.rollout())
        return rows
