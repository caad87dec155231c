"""The central loop: one thread that owns the model, the batch and the versions.

take commands (waiting only when nothing runs) → admit → prefill a bounded chunk → step the batch once
→ score a bounded chunk → one hop to the event loop with everything that happened.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from rollout_server.engine.batch import Batch
from rollout_server.engine.batches import Batches
from rollout_server.engine.cache import SlotRows
from rollout_server.engine.compiled import CompiledDecode
from rollout_server.engine.messages import (
    Abort,
    Command,
    EngineStatus,
    Event,
    Ping,
    PolicyCommand,
    Pong,
    Score,
    Scored,
    ScoredSequence,
    Stop,
    Submit,
)
from rollout_server.engine.model import ResidentModel
from rollout_server.engine.policy import PolicyTable
from rollout_server.engine.reports import Reports
from rollout_server.engine.scheduler import Scheduler
from rollout_server.engine.score import ScoreJob, Scorer
from rollout_server.engine.sequence import Group
from rollout_server.engine.switching import Switching
from rollout_server.errors import EngineFault, EngineUnavailable, NonFiniteLogits, RolloutError

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0


class Engine:
    """Lives on one thread. `post` carries events out, `show` replaces the status snapshot; both are thread-safe."""

    def __init__(
        self,
        model: ResidentModel,
        policies: PolicyTable,
        mailbox: queue.SimpleQueue[Command],
        post: Callable[[list[Event]], None],
        show: Callable[[EngineStatus], None],
        *,
        prefill_tokens: int,
    ) -> None:
        self._model = model
        self._policies = policies
        self._mailbox = mailbox
        self._post = post
        self._show = show
        self._budget = prefill_tokens
        self._stopping = False
        self._changes: deque[PolicyCommand] = deque()
        self._jobs: deque[ScoreJob] = deque()
        # What a failure in the middle of a turn is blamed on, besides the rows of the batch.
        self._changing: PolicyCommand | None = None
        self._admitting: Group | None = None
        self._scoring: ScoreJob | None = None
        self._scorer = Scorer(model.forward, model.make_caches, policies.route, model.info.vocab_size)
        self._batch = Batches(self._new_batch)
        kv_cells = model.info.kv_memory // model.info.kv_bytes_per_token
        self._scheduler = Scheduler(
            model.info.max_batch,
            kv_cells,
            lambda group: self._batch.longest(self._set_of(group)),
            lambda group, count, columns: self._batch.cells(self._set_of(group), count, columns),
        )
        self._reports = Reports(self._scheduler, policies)
        self._switching = Switching(policies, self._batch, self._reports, kv_cells)

    def _new_batch(self, parameters: int) -> Batch:
        model = self._model
        store = model.make_store()
        decode = None
        if model.compiles and isinstance(store, SlotRows):
            decode = CompiledDecode(model.forward, store, self._policies.routed)
        return Batch(
            model.forward,
            store,
            partial(self._policies.route, parameters),
            model.tokenizer,
            frozenset(model.info.eos_token_ids),
            model.info.vocab_size,
            decode,
        )

    def _set_of(self, group: Group) -> int:
        """The parameter set that a group runs on, or would if it were admitted now."""
        known = group.placement if group.version is not None else self._policies.placement(group.request.policy)
        return known.parameters

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turns until a `Stop` arrives. An exception out of here means the engine is dead."""
        self._show_status()
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        self._take_commands()
        self._end_overdue()
        try:
            self._compute()
        except Exception as error:  # the one place: whatever a step raises fails its rows by name
            self._fail_step(error)
        self._flush()

    def _compute(self) -> None:
        self._change_policies()
        self._admit()
        if self._batch.joining:
            self._reports.progress(self._batch.settle())
            self._reports.release(self._batch.release())
            self._reports.drop(self._batch.drop_cancelled())
            for row in self._batch.prefill(self._budget):
                # The alias may have moved while its prompt was read.
                self._switching.follow(row)
        if self._batch.active:
            self._reports.progress(self._batch.step())
            self._reports.release(self._batch.release())
        self._batch.keep(self._policies.sets)
        self._score()

    @property
    def _busy(self) -> bool:
        return bool(
            self._batch.active or self._batch.joining or self._jobs or self._changes or self._scheduler.waiting_requests
        )

    def _take_commands(self) -> None:
        """Applies everything in the mailbox; waits for the first command only when there is nothing to do."""
        wait = 0.0 if self._busy else IDLE_WAIT_S
        try:
            command = self._mailbox.get(timeout=wait) if wait else self._mailbox.get_nowait()
            while True:
                self._apply(command)
                self._flush()
                command = self._mailbox.get_nowait()
        except queue.Empty:
            return

    def _apply(self, command: Command) -> None:
        try:
            match command:
                case Submit():
                    self._scheduler.submit(command)
                    for group in command.groups:
                        # A name that is being pushed may not be there yet.
                        if not self._changes:
                            self._policies.check(group.policy)
                case Score():
                    self._start_score(command)
                case Abort():
                    for id in command.ids:
                        self._end_request(id, command.reason)
                case Ping():
                    self._reports.add(Pong(command.id))
                case Stop():
                    self._stopping = True
                case _:
                    self._changes.append(command)
        except RolloutError as error:
            self._reports.fail(getattr(command, "id", ""), error)

    def _flush(self) -> None:
        # The snapshot first: whoever is told of a change can see it.
        self._show_status()
        if events := self._reports.take():
            self._post(events)

    def _show_status(self, state: str = "ready", fault: str | None = None) -> None:
        self._show(
            EngineStatus(
                state=state,
                fault=fault,
                waiting=self._scheduler.waiting_requests,
                running=self._batch.size,
                policies=self._policies.snapshot(),
                steps=self._batch.steps,
                tokens=self._reports.tokens,
                slot_bytes=self._policies.slot_bytes,
                set_bytes=self._policies.set_bytes,
                sets=len(self._policies.sets),
            )
        )

    # ---- versions -------------------------------------------------------------------------------------------------

    def _change_policies(self) -> None:
        """In their order. One that is long is done in parts, between the steps of rows that decode meanwhile."""
        while self._changes:
            command = self._changing = self._changes.popleft()
            try:
                computing = self._batch.active or self._batch.joining or self._jobs
                if not self._policies.advance(command, self._settle, at_once=not computing):
                    self._changes.appendleft(command)
                    self._changing = None
                    return
                if self._policies.stages(command):
                    # Slot arrays are written in place only while no dispatched step refers to them.
                    self._settle()
                self._reports.add(self._policies.apply(command))
            except RolloutError as error:
                self._policies.abandon()
                self._reports.fail(command.id, error)
            self._changing = None
            for row in self._batch.rows:
                self._switching.follow(row)
            # The reply need not wait for the step of this turn.
            self._flush()

    def _settle(self) -> None:
        self._reports.progress(self._batch.settle())

    # ---- admission ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while admission := self._scheduler.next_admission(self._batch.size):
            group = admission.group
            if group.version is None and not self._take_version(group):
                if group.waiting:
                    break
                continue
            self._reports.progress(self._batch.settle())
            self._reports.release(self._batch.release())
            self._admitting = group
            self._batch.join(admission)
            self._admitting = None
            self._scheduler.admitted(admission)
            if group.request.wants.prompt_logprobs and not group.unscored and group.prompt_logprobs is None:
                self._score_prompt(group)

    def _take_version(self, group: Group) -> bool:
        """Gives a group the version its policy names now, one reference a sample. False if there is none: the group
        has failed, or goes on waiting where a change that came before it is under way."""
        request = group.request
        try:
            group.version, group.placement = self._policies.acquire(request.policy, request.n, request.min_version)
        except RolloutError as error:
            if not any(change.name == request.policy.name for change in self._changes):
                self._reports.fail_group(group, error)
            return False
        group.admitted_at = time.monotonic()
        return True

    # ---- scoring --------------------------------------------------------------------------------------------------

    def _start_score(self, score: Score) -> None:
        version, placement = self._policies.acquire(score.policy, 1, None)

        def finished(sequences: tuple[ScoredSequence, ...]) -> None:
            self._policies.release(version, 1)
            self._reports.add(Scored(score.id, version, score.temperature, sequences))

        def failed(error: RolloutError) -> None:
            self._policies.release(version, 1)
            self._reports.fail(score.id, error)

        self._jobs.append(
            ScoreJob(
                score.id,
                version,
                placement,
                score.sequences,
                score.starts,
                score.temperature,
                score.entropy,
                score.top_logprobs,
                finished=finished,
                failed=failed,
            )
        )

    def _score_prompt(self, group: Group) -> None:
        if group.version is None:
            raise RuntimeError("A group is scored before it has a version.")
        group.unscored = True
        self._policies.acquire_again(group.version, 1)
        version = group.version

        def finished(sequences: tuple[ScoredSequence, ...]) -> None:
            self._policies.release(version, 1)
            self._reports.prompt_scored(group, sequences[0].logprobs)

        def failed(error: RolloutError) -> None:
            self._policies.release(version, 1)
            self._reports.fail_group(group, error)

        self._jobs.append(
            ScoreJob(
                group.request.id,
                version,
                group.placement,
                (group.request.prompt_ids,),
                (0,),
                group=group,
                finished=finished,
                failed=failed,
            )
        )

    def _score(self) -> None:
        """One bounded chunk of the sequence that is being scored; between two sequences it is the next job's turn."""
        if not self._jobs:
            return
        job = self._scoring = self._jobs.popleft()
        try:
            self._scorer.advance(job, self._budget)
        except NonFiniteLogits as error:
            job.failed(error)
        else:
            if job.done:
                job.finished(tuple(job.results))
            elif job.caches is None:
                self._jobs.append(job)
            else:
                self._jobs.appendleft(job)
        self._scoring = None

    # ---- endings --------------------------------------------------------------------------------------------------

    def _end_overdue(self) -> None:
        for ticket in self._scheduler.overdue(time.monotonic()):
            self._end_request(ticket.id, "timeout")

    def _end_request(self, id: str, reason: str) -> None:
        """Ends what is left of a request; rows keep what they have. Unknown and closed ids are ignored."""
        ended = [job for job in self._jobs if job.id == id]
        if ended:
            self._jobs = deque(job for job in self._jobs if job.id != id)
        for job in ended:
            if job.group is None:
                job.failed(EngineUnavailable(f"The request was ended ({reason}) before it was scored."))
            else:
                # Rows that are held for the prompt's values are reported without them.
                self._policies.release(job.version, 1)
        self._reports.end_request(id, reason, self._batch)

    def _fail_step(self, error: Exception) -> None:
        """Fails by name whatever was being computed; its batch starts over empty, batches of other sets go on."""
        log.exception("A step failed; its rows fail by name and the batch is rebuilt.")
        fault = EngineFault(f"The step that computed this row failed: {type(error).__name__}: {error}")
        if self._scoring is not None:
            self._scoring.failed(fault)
            self._scoring = None
            return
        if self._changing is not None:
            self._policies.abandon()
            self._reports.fail(self._changing.id, fault)
            self._changing = None
        self._reports.fail_rows(*self._batch.fail(), fault)
        if self._admitting is not None:
            self._reports.fail_group(self._admitting, fault)
            self._admitting = None

    def die(self, cause: BaseException) -> None:
        """Last words: everything open fails by name and the status says why."""
        fault = EngineUnavailable(f"The engine stopped: {type(cause).__name__}: {cause}")
        self._close("dead", str(fault), fault)

    def stop(self) -> None:
        """Rows that have tokens are returned as aborted; requests that have nothing yet get the error."""
        error = EngineUnavailable("The server is stopping.")
        for id in list(self._scheduler.tickets):
            if self._reports.has_tokens(id, self._batch):
                self._end_request(id, "stopping")
        self._close("stopping", None, error)

    def _close(self, state: str, fault: str | None, error: RolloutError) -> None:
        for id in list(self._scheduler.tickets):
            self._reports.fail(id, error)
        for id in [job.id for job in self._jobs if job.group is None] + [change.id for change in self._changes]:
            self._reports.fail(id, error)
        # Events first: the end of the state fails whatever is still open on the other side.
        self._post(self._reports.take())
        self._show_status(state, fault)
