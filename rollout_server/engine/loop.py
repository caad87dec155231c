"""The central loop: one thread that owns the model, the batch and the versions.

take commands (waiting only when nothing runs) → admit → prefill or score a bounded chunk → step the batch once
→ one hop to the event loop with everything that happened.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from adapters.sets import BASE_SET
from rollout_server.engine.admitting import Admitting, Room
from rollout_server.engine.batch import Batch
from rollout_server.engine.batches import Batches
from rollout_server.engine.blame import Blame
from rollout_server.engine.budget import TurnBudget
from rollout_server.engine.cache import SlotRows
from rollout_server.engine.chunks import planned
from rollout_server.engine.compiled import CompiledDecode
from rollout_server.engine.embedding_messages import Embed
from rollout_server.engine.footprint import Release
from rollout_server.engine.kept_prefixes import PrefixCacheReset, ResetPrefixCache
from rollout_server.engine.lengths import StepCosts
from rollout_server.engine.memory import Memory
from rollout_server.engine.messages import (
    Abort,
    Command,
    EngineStatus,
    Event,
    Ping,
    Pong,
    Score,
    Stop,
    Submit,
)
from rollout_server.engine.model import ResidentModel
from rollout_server.engine.pause_messages import Pause, Resume
from rollout_server.engine.pausing import Pausing
from rollout_server.engine.policy import PolicyTable
from rollout_server.engine.policy_messages import PolicyCommand
from rollout_server.engine.preemption import Preemption
from rollout_server.engine.reading import Reading
from rollout_server.engine.references import References
from rollout_server.engine.replays import Replay
from rollout_server.engine.reports import Reports
from rollout_server.engine.reuse import Keeper, Reuse
from rollout_server.engine.scheduler import Scheduler
from rollout_server.engine.scoring_queue import ScoringQueue, make_reader
from rollout_server.engine.step_cost import measure
from rollout_server.engine.switching import Switching
from rollout_server.errors import EngineFault, EngineUnavailable, RolloutError

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
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model = model
        self._policies = policies
        self._mailbox = mailbox
        self._post = post
        self._show = show
        self._stopping = False
        self._changes: deque[PolicyCommand] = deque()
        self._blame = Blame()
        info = model.info
        slots = info.cache == "slots"
        kv_cells = info.kv_memory // info.kv_bytes_per_token
        self._reuse = Reuse(info.kv_memory, info.kv_bytes_per_token, info.digest, on=prefix_cache and slots)
        store = model.make_store()
        self._scheduler = Scheduler(info.max_batch, partial(store.packed, 1))
        self._reports = Reports(self._scheduler, policies)
        self._batch = Batches(
            self._new_batch,
            store,
            self._reports,
            self._blame,
            kv_cells,
            self._measure_step if slots else None,
            self._leave_room,
        )
        self._scoring = ScoringQueue(
            make_reader(model, policies),
            policies,
            self._blame,
            lambda cells: self._room.has(cells),
            lambda: not self._batch.size,
        )
        self._room = Room(policies, self._batch, self._scoring, lambda: self._scheduler.kept_cells, kv_cells)
        self._references = References(
            self._scoring, policies, self._reports, frozenset(info.eos_token_ids), info.embedding.pooling
        )
        self._admitting = Admitting(
            policies,
            self._batch,
            self._room,
            self._scheduler,
            self._reports,
            self._references,
            self._changes,
            self._blame,
        )
        self._preemption = Preemption(self._batch, policies, self._reports, self._scheduler, self._scoring, kv_cells)
        self._switching = Switching(policies, self._batch, self._reports, self._preemption)
        self._budget = TurnBudget(prefill_tokens, clock, planned if model.compiles else lambda tokens: tokens)
        self._reading = Reading(self._batch, self._scoring, self._switching, self._reports, self._budget)
        self._pausing = Pausing(self._reports)
        self._memory = Memory(self._batch, policies, self._reuse, self._scheduler, self._scoring, info)
        self._releases: deque[Release] = deque()

    def _new_batch(self, parameters: int) -> Batch:
        model = self._model
        store = model.make_store()
        decode = keeper = None
        if isinstance(store, SlotRows):
            if model.compiles:
                decode = CompiledDecode(model.forward, store, self._policies.routed)
            if self._reuse.on:
                keeper = Keeper(store, self._reuse)
        return Batch(
            model.forward,
            store,
            partial(self._policies.route, parameters),
            model.tokenizer,
            frozenset(model.info.eos_token_ids),
            model.info.vocab_size,
            decode,
            lambda placement: self._policies.route_rows([placement]),
            keeper,
            lambda tokens: self._room.has(self._batch.prompt_cells(tokens) + self._scoring.cells),
        )

    def _measure_step(self, width: int) -> StepCosts:
        model = self._model
        return measure(model.forward, model.make_slots, partial(self._policies.route, BASE_SET), width)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turns until a `Stop` arrives. An exception out of here means the engine is dead."""
        self._batch.learn_costs()
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
        if self._reports.has_met:
            self._reports.end_met(self._batch.rows, self._batch.joining)
        self._pausing.answer(self._computing)
        self._flush()

    def _compute(self) -> None:
        self._give_back()
        self._change_policies()
        # Not whenever rows come to fill more: each reference taken or given back makes the snapshot anew.
        self._reuse.follow(self._policies.snapshot())
        self._budget.begin(decoding=self._batch.active, rows=self._batch.size)
        self._admitting.call_back()
        if self._pausing.frozen:
            # What is in flight is read, and what was ended meanwhile leaves.
            self._batch.settle_and_release()
            self._batch.drop_cancelled()
            return
        if self._preemption.resume() and not self._pausing.paused:
            self._admitting.admit()
        self._reading.divide()
        if self._reading.prefills:
            self._batch.settle_and_release()
            self._batch.drop_cancelled()
            self._reading.prefill()
        # Behind the step in flight and before the next one: rows wait for it once, and are told of their tokens then.
        self._reading.score(self._scheduler.crowded or bool(self._batch.aside))
        self._preemption.make_room()
        if self._batch.active:
            self._batch.step()
            self._batch.release(few=True)
        self._batch.rearrange()
        self._batch.keep(self._policies.sets)
        for group in self._reports.take_complete():
            self._references.score_rows(group)
        self._budget.end()
        self._share_out()

    def _share_out(self) -> None:
        """What is kept for later requests comes before the arrays that rows have left, and after the rows."""
        held = self._batch.held_cells
        kept = self._reuse.status.nbytes // self._model.info.kv_bytes_per_token
        if (idle := self._batch.idle_cells) and self._scoring.cells + held + idle + kept > self._room.kv_cells:
            self._batch.drop_idle()
        self._reuse.follow(self._policies.snapshot())
        self._leave_room(held)

    def _leave_room(self, cells: int) -> None:
        """What rows and the scorer may come to fill is theirs, before what is kept for later requests."""
        self._reuse.fit(cells + self._scheduler.kept_cells + self._scoring.cells)

    def _give_back(self) -> None:
        while self._releases:
            self._batch.settle_and_release()
            self._reports.add(self._memory.give_back(self._releases.popleft().id))
        self._memory.rest(self._busy)

    @property
    def _computing(self) -> bool:
        """Whether anything is being sampled or scored."""
        batch = self._batch
        return bool(batch.active or batch.joining or batch.aside or self._scoring.busy or self._reports.has_complete)

    @property
    def _busy(self) -> bool:
        """Whether a turn has something to do."""
        if self._changes or self._releases:
            return True
        if self._pausing.paused:
            return self._computing and not self._pausing.frozen
        return self._computing or self._scheduler.pressing

    def _take_commands(self) -> None:
        """Applies everything in the mailbox; waits for the first command only when there is nothing to do."""
        wait = 0.0 if self._busy else self._scheduler.rest(time.monotonic(), IDLE_WAIT_S)
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
                case Score() | Replay() | Embed():
                    if not self._pausing.holds(command):
                        self._references.read(command)
                case Pause():
                    self._pausing.pause(command)
                    for id in self._reports.begun if command.mode == "abort" else ():
                        self._end_request(id, "pause")
                case Resume():
                    for held in self._pausing.resume(command):
                        self._apply(held)
                case Abort():
                    for id in command.ids:
                        self._end_request(id, command.reason)
                case ResetPrefixCache():
                    self._reports.add(PrefixCacheReset(command.id, self._reuse.clear()))
                case Release():
                    self._releases.append(command)
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
                aside=len(self._batch.aside),
                preemptions=self._preemption.count,
                policies=self._policies.snapshot(),
                steps=self._batch.steps,
                tokens=self._reports.tokens,
                slot_bytes=self._policies.slot_bytes,
                set_bytes=self._policies.set_bytes,
                sets=len(self._policies.sets),
                prefix=self._reuse.status,
                paused=self._pausing.mode,
                memory=self._memory.status(),
            )
        )

    # ---- versions -------------------------------------------------------------------------------------------------

    def _change_policies(self) -> None:
        """In their order. One that is long is done in parts, between the steps of rows that decode meanwhile."""
        while self._changes:
            command = self._changes.popleft()
            with self._blame(command):
                if not self._change(command):
                    self._changes.appendleft(command)
                    return
            for row in self._batch.rows:
                self._switching.follow(row)
            # The reply need not wait for the step of this turn.
            self._flush()

    def _change(self, command: PolicyCommand) -> bool:
        """Takes a change further; whether it is done, or has failed."""
        computing = self._batch.active or self._batch.joining or self._scoring.busy
        try:
            if not self._policies.advance(command, self._batch.settle, at_once=not computing):
                return False
            if self._policies.stages(command):
                # Slot arrays are written in place only while no dispatched step refers to them.
                self._batch.settle()
            self._reports.add(self._policies.apply(command))
        except RolloutError as error:
            self._policies.abandon()
            self._reports.fail(command.id, error)
        return True

    # ---- endings --------------------------------------------------------------------------------------------------

    def _end_overdue(self) -> None:
        for ticket in self._scheduler.overdue(time.monotonic()):
            self._end_request(ticket.id, "timeout")

    def _end_request(self, id: str, reason: str) -> None:
        """Ends what is left of a request; rows keep what they have. Unknown and closed ids are ignored."""
        self._scoring.end(id, reason)
        self._pausing.end(id, reason)
        self._reports.end_request(id, reason, self._batch.rows, self._batch.joining)

    def _fail_step(self, error: Exception) -> None:
        """Fails by name whatever was being computed; its batch starts over empty, batches of other sets go on."""
        log.exception("A step failed; its rows fail by name and the batch is rebuilt.")
        fault = EngineFault(f"The step that computed this row failed: {type(error).__name__}: {error}")
        if self._blame.of(ScoringQueue):
            self._scoring.fail(fault)
            self._blame.clear()
            return
        for blamed in self._blame:
            if isinstance(blamed, PolicyCommand):
                self._policies.abandon()
                self._reports.fail(blamed.id, fault)
        # What was being copied for later may never be there.
        self._reuse.clear()
        self._reports.fail_rows(*self._batch.fail(), fault)
        self._admitting.fail(fault)
        self._blame.clear()

    def die(self, cause: BaseException) -> None:
        """Last words: everything open fails by name and the status says why."""
        fault = EngineUnavailable(f"The engine stopped: {type(cause).__name__}: {cause}")
        self._close("dead", str(fault), fault)

    def stop(self) -> None:
        """Rows that have tokens are returned as aborted; requests that have nothing yet get the error."""
        error = EngineUnavailable("The server is stopping.")
        for id in list(self._scheduler.tickets):
            if self._reports.has_tokens(id, self._batch.rows):
                self._end_request(id, "stopping")
        self._close("stopping", None, error)

    def _close(self, state: str, fault: str | None, error: RolloutError) -> None:
        for id in list(self._scheduler.tickets):
            self._reports.fail(id, error)
        changes = [change.id for change in [*self._changes, *self._releases]]
        for id in self._scoring.own_requests + self._pausing.open_requests + changes:
            self._reports.fail(id, error)
        # Events first: the end of the state fails whatever is still open on the other side.
        self._post(self._reports.take())
        self._show_status(state, fault)
