"""The loop of an encoder's engine: take what the mailbox holds, read one group of sequences, tell of what is done.
Every request gets exactly one terminal event, and a group that fails takes down nothing but its own requests."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable

import mlx.core as mx

from rollout_server.engine.blame import Blame
from rollout_server.engine.encoding.queue import EncodingJob, EncodingQueue, ForwardGroup
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
    Released,
    ResetPrefixCache,
    Resume,
    RowsSeen,
    Stop,
)
from rollout_server.engine.messages.rollouts import Command, Event, RequestFailed, Submit
from rollout_server.engine.messages.scoring import Classify, Embed, HoldScorer, LetScorerGo, Replay, Score
from rollout_server.engine.messages.status import EngineStatus, MemoryStatus
from rollout_server.engine.messages.versions import PolicyCommand, Publish
from rollout_server.engine.model.encoders.reading import forward, results
from rollout_server.engine.model.encoders.resident import ResidentEncoder
from rollout_server.engine.policies.held_scorers import HeldScorers
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.scheduling.idle_memory import IDLE_S
from rollout_server.engine.scheduling.pause import PauseState
from rollout_server.engine.timeline import Timeline
from rollout_server.errors import (
    EngineEnded,
    EngineFault,
    EngineUnavailable,
    InvalidField,
    NonFiniteLogits,
    NotFound,
    RolloutError,
)

log = logging.getLogger(__name__)

IDLE_WAIT_S = 1.0


class Answers:
    """Events of one turn, in order."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        self._events.append(event)

    def fail(self, id: str, error: RolloutError) -> None:
        self._events.append(RequestFailed(id, error))

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class EncoderEngine:
    """Lives on one thread. `post` carries events out and `show` replaces the status snapshot; both are thread-safe.
    `device_fault` says what is wrong with the device, after a forward that failed; `clock` is in seconds."""

    def __init__(
        self,
        encoder: ResidentEncoder,
        policies: PolicyTable,
        mailbox: queue.SimpleQueue[Command],
        post: Callable[[list[Event]], None],
        show: Callable[[EngineStatus], None],
        *,
        device_fault: Callable[[], str | None],
        timeline: Timeline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encoder = encoder
        self._policies = policies
        self._mailbox = mailbox
        self._post = post
        self._show = show
        self._device_fault = device_fault
        self._timeline = timeline
        self._clock = clock
        self._jobs = EncodingQueue(encoder.info.prefill_tokens, encoder.info.max_model_len)
        self._answers = Answers()
        self._pause_state = PauseState(self._answers)
        self._held = HeldScorers(policies, encoder.info.labels)
        self._changes: deque[PolicyCommand] = deque()
        self._blame = Blame()
        self._steps = 0
        self._read_at: float | None = None
        """When the last forward ended; None where nothing is left of it."""
        self._stopping = False

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turns until a `Stop` arrives. An exception out of here means the engine is dead."""
        self._show(self._status())
        while not self._stopping:
            self.turn()

    def turn(self) -> None:
        with self._timeline.turn() as turn:
            with self._timeline.part("take"):
                self._take_commands()
            if (error := self._blame.attempt(self._compute)) is not None:
                turn.note(error=type(error).__name__)
                self._fail(error)
            self._pause_state.answer(self._jobs.busy or self._held.outlive(()))
            self._tell()

    def _compute(self) -> None:
        while self._changes:
            with self._blame(self._changes[0]):
                self._change(self._changes.popleft())
        group = None if self._pause_state.frozen else self._jobs.take()
        if group is not None:
            with self._blame(group):
                self._read(group)
        elif self._read_at is not None and self._clock() - self._read_at >= IDLE_S:
            # Most users train on the same device.
            mx.clear_cache()
            self._read_at = None

    def _read(self, group: ForwardGroup) -> None:
        """One forward: versions on the same weights share it, row by row."""
        passages, placements = group.passages, group.placements
        with self._timeline.part("score") as part:
            self._policies.route_rows(placements)
            model, mixed = self._encoder.model, len(set(placements)) > 1
            found = results(model, forward(model, passages, mixed=mixed), passages)
            part.note(tokens=sum(len(passage.ids) for passage in passages))
        self._steps += 1
        self._read_at = self._clock()
        for (job, index), values in zip(group.entries, found, strict=True):
            if isinstance(values, NonFiniteLogits):
                self._end(job, values)
            elif not job.ended:
                job.keep(index, values)
                if job.complete:
                    self._end(job)

    def _fail(self, error: Exception) -> None:
        """Raises `EngineUnavailable` where the device is gone, since everything that came after would fail too."""
        if (gone := self._device_fault()) is not None:
            raise EngineUnavailable(
                f"The device no longer computes ({gone}). Nothing that runs on it can be saved: start the server "
                "again; with --state-dir it serves the versions that it had."
            ) from error
        self._policies.routed.forget_inputs()
        log.error("A step failed; what it was for fails by name.", exc_info=error)
        fault = EngineFault(f"The step that computed this failed: {type(error).__name__}: {error}")
        for group in self._blame.of(ForwardGroup):
            for job in group.jobs:
                self._end(job, fault)
        for blamed in self._blame:
            if isinstance(blamed, PolicyCommand):
                self._policies.abandon()
                self._answers.fail(blamed.id, fault)
        self._blame.clear()

    def _end(self, job: EncodingJob, error: RolloutError | None = None) -> None:
        """Answers a request that is open, with what was read unless there is an error."""
        if job.ended:
            return
        self._jobs.close(job)
        self._policies.release(job.version, 1)
        info = self._encoder.info
        if error is None:
            self._answers.add(job.reply(info.labels, info.activation))
        else:
            self._answers.fail(job.id, error)

    def _tell(self) -> None:
        # The snapshot first: whoever is told of a change can see it.
        self._show(self._status())
        if events := self._answers.take():
            self._post(events)

    # ---- commands -------------------------------------------------------------------------------------------------

    def _take_commands(self) -> None:
        """Applies everything in the mailbox; waits for the first command only when there is nothing to do."""
        try:
            if self._changes or (self._jobs.busy and not self._pause_state.frozen):
                command = self._mailbox.get_nowait()
            else:
                with self._timeline.part("idle"):
                    command = self._mailbox.get(timeout=IDLE_WAIT_S)
            while True:
                with self._timeline.part("apply") as part:
                    part.note(command=type(command).__name__)
                    self._apply(command)
                command = self._mailbox.get_nowait()
        except queue.Empty:
            return

    def _apply(self, command: Command) -> None:
        try:
            match command:
                case Embed() | Classify():
                    if not self._pause_state.holds(command):
                        self._jobs.add(self._job(command))
                case HoldScorer():
                    self._answers.add(self._held.hold(command))
                case LetScorerGo():
                    self._held.let_go(command.id)
                case Submit() | Score() | Replay():
                    raise InvalidField("An encoder generates nothing, and gives no log-probabilities.", param="policy")
                case Pause():
                    self._pause_state.pause(command)
                    for job in self._jobs.jobs if command.mode == "abort" else ():
                        self._end_request(job.id, "pause")
                case Resume():
                    for held in self._pause_state.resume(command):
                        self._apply(held)
                case Abort():
                    for id in command.ids:
                        self._end_request(id, command.reason)
                case ResetPrefixCache():
                    self._answers.add(PrefixCacheReset(command.id, 0))
                case Release():
                    self._answers.add(self._released(command))
                case Ping():
                    self._answers.add(Pong(command.id))
                case Leave():
                    raise NotFound(NO_FLEET)
                case LookAtRows():
                    self._answers.add(RowsSeen(command.id, (), 0))
                case Stop():
                    self._stopping = True
                case _:
                    self._changes.append(command)
        except RolloutError as error:
            self._answers.fail(getattr(command, "id", ""), error)

    def _job(self, command: Embed | Classify) -> EncodingJob:
        """Under the version that a call holds, or else that its policy means now."""
        if isinstance(command, Classify) and command.held:
            held = self._held.again(command.held)
            return EncodingJob(command, held.version, held.placement, owner=held.owner)
        version, placement = self._policies.acquire(command.policy, 1, None, reads=True)
        return EncodingJob(command, version, placement)

    def _change(self, command: PolicyCommand) -> None:
        """All at once: every forward has been waited for, so that nothing runs beside it."""
        with self._timeline.part("change versions") as part:
            part.note(command=type(command).__name__, policy=command.name)
            try:
                reply = None
                while reply is None:
                    reply = self._policies.change(command, lambda: None, at_once=True)
                self._answers.add(reply)
            except RolloutError as error:
                self._policies.abandon()
                self._answers.fail(command.id, error)
            if isinstance(command, Publish):
                self._timeline.push(command.id, command.name, command.before, part, done=True)
        # The reply need not wait for a forward.
        self._tell()

    def _end_request(self, id: str, reason: str) -> None:
        """Unknown and closed ids are ignored."""
        self._pause_state.end(id, reason)
        for job in self._jobs.of(id):
            self._end(job, EngineUnavailable(f"The request was ended ({reason}) before it was scored."))

    def _released(self, command: Release) -> Released:
        before = mx.get_active_memory() + mx.get_cache_memory()
        self._policies.trim()
        mx.clear_cache()
        return Released(command.id, max(0, before - mx.get_active_memory() - mx.get_cache_memory()), 0)

    # ---- status and endings ---------------------------------------------------------------------------------------

    def _status(self, state: str = "ready", fault: str | None = None) -> EngineStatus:
        policies = self._policies
        return EngineStatus(
            state=state,
            fault=fault,
            waiting=len(self._jobs.jobs),
            waiting_rows=sum(job.unread for job in self._jobs.jobs),
            policies=policies.snapshot(),
            steps=self._steps,
            slot_bytes=policies.slot_bytes,
            set_bytes=policies.set_bytes,
            sets=len(policies.sets),
            paused=self._pause_state.mode,
            memory=MemoryStatus(
                weights=self._encoder.info.weight_bytes,
                slots=policies.slot_bytes,
                sets=policies.set_bytes,
                active=mx.get_active_memory(),
                cached=mx.get_cache_memory(),
                peak=mx.get_peak_memory(),
            ),
        )

    def die(self, cause: BaseException) -> None:
        """Last words: everything open fails by name and the status says why."""
        fault = EngineEnded(f"The engine stopped: {type(cause).__name__}: {cause}")
        self._close("dead", str(fault), fault)

    def stop(self) -> None:
        """What is not answered yet gets the error."""
        self._close("stopping", None, EngineEnded("The server is stopping."))

    def _close(self, state: str, fault: str | None, error: RolloutError) -> None:
        open_jobs, changes = ([each.id for each in found] for found in (self._jobs.jobs, self._changes))
        for id in [*open_jobs, *changes, *self._pause_state.open_requests]:
            self._answers.fail(id, error)
        # Events first: the end of the state fails whatever is still open on the other side.
        self._post(self._answers.take())
        self._show(self._status(state, fault))
