"""The central loop: one thread that owns the model, the batches and the versions.

A turn takes commands (waiting only when nothing runs), changes versions, admits, prefills, scores, makes room, steps
every batch once, shares out what memory is left, and tells the event loop in one hop of everything that happened.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable

from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.prefix_reuse import PrefixReuse
from rollout_server.engine.messages.control import (
    NO_FLEET,
    Abort,
    Leave,
    LookAtRows,
    Pause,
    Ping,
    Pong,
    PrefixCacheReset,
    Release,
    ResetPrefixCache,
    Resume,
    Stop,
)
from rollout_server.engine.messages.rollouts import Command, Event, Submit
from rollout_server.engine.messages.scoring import Classify, Embed, HoldScorer, LetScorerGo, Replay, Score
from rollout_server.engine.messages.versions import PolicyCommand, Publish
from rollout_server.engine.policies.held_scorers import HeldScorers
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.admission import AdmissionControl
from rollout_server.engine.scheduling.failures import Failures
from rollout_server.engine.scheduling.idle_memory import Memory
from rollout_server.engine.scheduling.on_update import VersionSwitcher
from rollout_server.engine.scheduling.pause import PauseState
from rollout_server.engine.scheduling.preemption import Preemption
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scheduling.turn_costs import Kind
from rollout_server.engine.scoring.queue import ScoringQueue
from rollout_server.engine.scoring.tasks import ScoringTasks
from rollout_server.engine.sight.features import Eyes
from rollout_server.engine.sight.seen import View
from rollout_server.engine.status_board import StatusBoard
from rollout_server.engine.timeline import Timeline
from rollout_server.errors import EngineEnded, NotFound, RolloutError

IDLE_WAIT_S = 1.0


class Engine:
    """Lives on one thread; `assembly.build_engine` makes it. `post` carries events out and is thread-safe. `changes`
    are the changes of versions that wait or are under way, `failures` says what one in a turn takes along, `eyes` see
    pictures, where the model has a tower, `prepare` does what is to be done before the first turn, and `clock` is the
    one of deadlines, in seconds."""

    def __init__(
        self,
        mailbox: queue.SimpleQueue[Command],
        post: Callable[[list[Event]], None],
        *,
        policies: PolicyTable,
        changes: deque[PolicyCommand],
        requests: RequestQueue,
        reports: Reports,
        admission: AdmissionControl,
        batches: Batches,
        scoring: ScoringQueue,
        tasks: ScoringTasks,
        held: HeldScorers,
        preemption: Preemption,
        switcher: VersionSwitcher,
        budget: TurnBudget,
        pause_state: PauseState,
        memory: Memory,
        prefix_reuse: PrefixReuse,
        status: StatusBoard,
        failures: Failures,
        timeline: Timeline,
        eyes: Eyes | None,
        prepare: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mailbox = mailbox
        self._post = post
        self._policies = policies
        self._changes = changes
        self._requests, self._reports = requests, reports
        self._admission = admission
        self._batches = batches
        self._scoring = scoring
        self._tasks = tasks
        self._held = held
        self._preemption = preemption
        self._switcher = switcher
        self._budget, self._clock = budget, clock
        self._pause_state, self._memory = pause_state, memory
        self._prefix_reuse = prefix_reuse
        self._status = status
        self._failures = failures
        self._timeline = timeline
        self._eyes = eyes
        self._prepare = prepare
        self._stopping = False

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turns until a `Stop` arrives. An exception out of here means the engine is dead."""
        with self._timeline.part("warm"):
            self._prepare()
            self._batches.learn_costs()
            self._budget.learn_costs()
        self._status.show()
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        with self._timeline.turn() as turn:
            with self._timeline.part("take"):
                self._take_commands()
            self._end_overdue()
            if (error := self._failures.blame.attempt(self._compute)) is not None:
                turn.note(error=type(error).__name__)
                self._failures.fail(error)
            if self._reports.has_met:
                self._reports.end_met(self._batches.rows, self._batches.joining)
            if self._pause_state.unanswered:
                self._pause_state.answer(self._computing or self._held.outlive(self._requests.open_requests))
            with self._timeline.part("tell"):
                self._tell()

    def _compute(self) -> None:
        self._give_back()
        self._change_versions()
        # Not whenever rows come to fill more: each reference taken or given back makes the snapshot anew.
        self._prefix_reuse.follow(self._policies.snapshot())
        if not (self._computing or self._requests.pressing or self._requests.open_requests):
            self._batches.keep(self._policies.sets)
            return
        flying = self._batches.flying
        self._admission.begin_turn(self._budget, paused=self._pause_state.paused)
        self._admission.call_back()
        if self._pause_state.frozen:
            # What is in flight is read, and what was ended meanwhile leaves.
            self._batches.settle_and_release()
            self._batches.drop_cancelled()
            return
        part = self._timeline.part
        with part("admit"):
            self._admit()
        with part("prefill"):
            self._prefill()
        # Behind the step in flight and before the next one: rows wait for it once, and are told of their tokens then.
        self._score()
        with part("make room"):
            self._preemption.make_room()
        with part("decode"):
            self._step()
        self._budget.end(whole=flying and self._batches.flying)
        with part("share out"):
            self._memory.share_out()

    def _admit(self) -> None:
        """Preempted rows come first. When it is known who joins, the turn's budget is divided."""
        if self._preemption.resume() and not self._pause_state.paused and self._budget.admits():
            self._admission.admit()
        wanting: list[Kind] = []
        if self._batches.reading:
            wanting.append("prefill")
        if self._scoring.busy:
            wanting.append(self._scoring.kind)
        self._budget.divide(wanting, self._admission.joining)

    def _prefill(self) -> None:
        """The step in flight is read first, but only where groups that join are read or leave."""
        share = self._budget.share("prefill")
        cancelled = any(joining.group.cancelled for joining in self._batches.joining)
        if not cancelled and not (self._batches.reading and share):
            return
        self._batches.settle_and_release()
        self._batches.drop_cancelled()
        self._preemption.let_grow()
        if self._batches.reading and share and self._look("prefill", self._admission.views, share):
            self._budget.measure("prefill", lambda: self._prefill_tokens(share))

    def _look(self, reader: str, views: list[View], tokens: int) -> bool:
        """Has the tower read the pictures among what is read next, apart from reading, so that what a token costs is
        learnt without it; returns whether it is read in this turn."""
        eyes = self._eyes
        if eyes is None or all(sight is None for sight, _, _ in views):
            return True
        with self._timeline.part("look") as part:
            before = eyes.looked
            reads = self._budget.look(lambda most: eyes.look_ahead(reader, views, tokens, most))
            part.note(pictures=eyes.looked - before)
        return reads

    def _prefill_tokens(self, share: int) -> int:
        before = self._batches.prefilled
        for row in self._batches.prefill(share):
            # The alias may have moved while its prompt was read, or while it was away.
            self._reports.let_go(row)
            self._switcher.follow(row)
        return self._batches.prefilled - before

    def _score(self) -> None:
        if self._scoring.busy and (share := self._budget.share(kind := self._scoring.kind)):
            crowded = self._requests.crowded or bool(self._batches.preempted)
            alone = not self._batches.size
            before = self._budget.tokens
            with self._timeline.part("score") as part:
                views = self._scoring.fill(share, crowded=crowded, alone=alone)
                with self._failures.blame(self._scoring):
                    reads = self._look("scoring", views, sum(count for _, _, count in views))
                if reads:
                    self._budget.measure(kind, lambda: self._scoring.advance(share))
                part.note(tokens=self._budget.tokens - before)

    def _step(self) -> None:
        joining = self._admission.joining
        if self._batches.active and self._budget.steps(rows=self._batches.size - joining, joining=joining):
            self._batches.step()
            self._batches.release(few=True)
        self._batches.rearrange()
        self._batches.keep(self._policies.sets)
        for group in self._reports.take_complete():
            self._tasks.score_rows(group)

    def _give_back(self) -> None:
        """Memory that somebody asked for, and what an engine at rest does not need."""
        while self._memory.releases:
            self._batches.settle_and_release()
            self._reports.add(self._memory.give_back())
        self._memory.rest(self._busy)

    def _tell(self) -> None:
        # The snapshot first: whoever is told of a change can see it.
        self._status.show()
        if events := self._reports.take():
            self._post(events)

    # ---- commands -------------------------------------------------------------------------------------------------

    @property
    def _computing(self) -> bool:
        """True if anything is being sampled or scored."""
        rows = self._batches.active or self._batches.joining or self._batches.preempted
        return bool(rows or self._scoring.busy or self._reports.has_complete)

    @property
    def _busy(self) -> bool:
        """True if a turn has something to do."""
        if self._changes or self._memory.releases:
            return True
        if self._pause_state.paused:
            return self._computing and not self._pause_state.frozen
        return self._computing or self._requests.pressing

    def _take_commands(self) -> None:
        """Applies everything in the mailbox; waits for the first command only when there is nothing to do."""
        wait = 0.0 if self._busy else self._requests.rest(self._clock(), IDLE_WAIT_S)
        try:
            command = self._rest(wait) if wait else self._mailbox.get_nowait()
            while True:
                with self._timeline.part("apply") as part:
                    part.note(command=type(command).__name__)
                    self._apply(command)
                self._tell()
                command = self._mailbox.get_nowait()
        except queue.Empty:
            return

    def _rest(self, seconds: float) -> Command:
        with self._timeline.part("idle"):
            return self._mailbox.get(timeout=seconds)

    def _apply(self, command: Command) -> None:
        try:
            match command:
                case Submit():
                    for group in self._requests.submit(command).groups:
                        # A name that is being pushed may not be there yet.
                        if not self._changes:
                            self._policies.check(group.address)
                case Score() | Replay() | Embed() | Classify():
                    if not self._pause_state.holds(command):
                        self._tasks.read(command)
                case HoldScorer():
                    self._reports.add(self._held.hold(command))
                case LetScorerGo():
                    self._held.let_go(command.id)
                case Pause():
                    self._pause_state.pause(command)
                    for id in self._reports.begun if command.mode == "abort" else ():
                        self._end_request(id, "pause")
                case Resume():
                    for held in self._pause_state.resume(command):
                        self._apply(held)
                case Abort():
                    for id in command.ids:
                        self._end_request(id, command.reason)
                case ResetPrefixCache():
                    self._reports.add(PrefixCacheReset(command.id, self._prefix_reuse.clear()))
                case Release():
                    self._memory.releases.append(command)
                case Ping():
                    self._reports.add(Pong(command.id))
                case Leave():
                    raise NotFound(NO_FLEET)
                case LookAtRows():
                    self._reports.add(self._status.rows(command.id))
                case Stop():
                    self._stopping = True
                case _:
                    self._changes.append(command)
        except RolloutError as error:
            self._reports.fail(getattr(command, "id", ""), error)

    # ---- versions -------------------------------------------------------------------------------------------------

    def _change_versions(self) -> None:
        """In their order. One that is long is done in parts, between the steps of rows that decode meanwhile."""
        while self._changes:
            command = self._changes.popleft()
            with self._timeline.part("change versions") as part, self._failures.blame(command):
                part.note(command=type(command).__name__, policy=command.name)
                done = self._change(command)
                if isinstance(command, Publish):
                    self._timeline.push(command.id, command.name, command.before, part, done=done)
                if not done:
                    self._changes.appendleft(command)
                    return
            for row in self._batches.rows:
                self._switcher.follow(row)
            # The reply need not wait for the step of this turn.
            self._tell()

    def _change(self, command: PolicyCommand) -> bool:
        """Takes a change further; whether it is done, or has failed."""
        computing = self._batches.active or self._batches.joining or self._scoring.busy
        try:
            if (reply := self._policies.change(command, self._batches.settle, at_once=not computing)) is None:
                return False
            self._reports.add(reply)
        except RolloutError as error:
            self._policies.abandon()
            self._reports.fail(command.id, error)
        return True

    # ---- endings --------------------------------------------------------------------------------------------------

    def _end_overdue(self) -> None:
        for open_request in self._requests.overdue(self._clock()):
            self._end_request(open_request.id, "timeout")

    def _end_request(self, id: str, reason: str) -> None:
        """Ends what is left of a request; rows keep what they have. Unknown and closed ids are ignored."""
        self._scoring.end(id, reason)
        self._pause_state.end(id, reason)
        self._reports.end_request(id, reason, self._batches.rows, self._batches.joining)

    def die(self, cause: BaseException) -> None:
        """Last words: everything open fails by name and the status says why."""
        fault = EngineEnded(f"The engine stopped: {type(cause).__name__}: {cause}")
        self._close("dead", str(fault), fault)

    def stop(self) -> None:
        """Rows that have tokens are returned as aborted; requests that have nothing yet get the error."""
        error = EngineEnded("The server is stopping.")
        for id in list(self._requests.open_requests):
            if self._reports.has_tokens(id, self._batches.rows):
                self._end_request(id, "stopping")
        self._close("stopping", None, error)

    def _close(self, state: str, fault: str | None, error: RolloutError) -> None:
        for id in list(self._requests.open_requests):
            self._reports.fail(id, error)
        changes = [change.id for change in [*self._changes, *self._memory.releases]]
        for id in self._scoring.own_requests + self._pause_state.open_requests + changes:
            self._reports.fail(id, error)
        # Events first: the end of the state fails whatever is still open on the other side.
        self._post(self._reports.take())
        self._status.show(state, fault)
