"""Builds the engine: who works with whom. Everything is made from what it needs, so nothing here is named before it is
there."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from adapters.placement import BASE_SET
from rollout_server.engine.batch.batch import Batch
from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.decoder import Decoder
from rollout_server.engine.batch.length_buckets import StepCosts, measure
from rollout_server.engine.batch.measured_reading import cells_of, readings
from rollout_server.engine.batch.prefix_reuse import PrefixReuse
from rollout_server.engine.blame import Blame
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.sizes import planned
from rollout_server.engine.kv_cache.store import Forward
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.messages.rollouts import Command, Event
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import PolicyCommand
from rollout_server.engine.model.device import device_fault
from rollout_server.engine.model.forward.compiled import CompiledDecode, Traces
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.model.warm import WarmUp
from rollout_server.engine.policies.held_scorers import HeldScorers
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.admission import AdmissionControl
from rollout_server.engine.scheduling.failures import Failures
from rollout_server.engine.scheduling.idle_memory import Memory, keep_for_later
from rollout_server.engine.scheduling.on_update import VersionSwitcher
from rollout_server.engine.scheduling.pause import PauseState
from rollout_server.engine.scheduling.preemption import Preemption
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scoring.queue import ScoringQueue, make_reader
from rollout_server.engine.scoring.tasks import ScoringTasks
from rollout_server.engine.sight.features import SHARE
from rollout_server.engine.status_board import StatusBoard
from rollout_server.engine.timeline import Timeline


def build_engine(
    model: ResidentModel,
    policies: PolicyTable,
    mailbox: queue.SimpleQueue[Command],
    post: Callable[[list[Event]], None],
    show: Callable[[EngineStatus], None],
    options: EngineOptions,
    *,
    clock: Callable[[], float] = time.monotonic,
    turn_clock: Callable[[], float] | None = None,
    device_fault: Callable[[], str | None] = device_fault,
    timeline: Timeline | None = None,
) -> Engine:
    """`post` carries events out, `show` replaces the status snapshot; both are thread-safe. `clock` (seconds) decides;
    turns are measured by `turn_clock`, if given. `device_fault` says what is wrong with the device after a failure."""
    info, eyes, blame, traces, timeline = model.info, model.eyes, blame_of(model), Traces(), timeline or Timeline()
    prefix_reuse, ledger = kept_of(model, options)
    requests, changes, held = requests_of(model, ledger), deque[PolicyCommand](), HeldScorers(policies)
    reports = Reports(requests, policies, tell_admissions=options.tell_admissions)
    batches = batches_of(model, policies, prefix_reuse, ledger, reports, blame, traces, timeline, clock)
    scoring = ScoringQueue(make_reader(model, policies, prefix_reuse), policies, ledger, blame)
    tasks = ScoringTasks(scoring, policies, held, reports, info, eyes)
    admission = AdmissionControl(policies, batches, ledger, requests, reports, tasks, changes, blame, clock)
    preemption, pause_state = Preemption(batches, policies, reports, requests, ledger), PauseState(reports)
    memory = Memory(batches, policies, prefix_reuse, ledger, requests, scoring, info, clock, eyes)
    return Engine(
        mailbox,
        post,
        policies=policies,
        changes=changes,
        requests=requests,
        reports=reports,
        admission=admission,
        batches=batches,
        scoring=scoring,
        tasks=tasks,
        held=held,
        preemption=preemption,
        switcher=VersionSwitcher(policies, batches, reports, preemption),
        budget=budget_of(model, policies, ledger, turn_clock or clock, options),
        pause_state=pause_state,
        memory=memory,
        prefix_reuse=prefix_reuse,
        status=StatusBoard(show, requests, batches, reports, policies, preemption, pause_state, prefix_reuse, memory),
        failures=Failures(policies, reports, batches, admission, scoring, prefix_reuse, blame, device_fault),
        timeline=timeline,
        eyes=eyes,
        prepare=partial(warmed, model, policies, traces, ledger.limit, mailbox, clock, on=options.warm),
        clock=clock,
    )


def blame_of(model: ResidentModel) -> Blame:
    """The one that is told of pictures too, where the model sees any."""
    return model.eyes.blame if model.eyes is not None else Blame()


def kept_of(model: ResidentModel, options: EngineOptions) -> tuple[PrefixReuse, KVLedger]:
    """The prefix cache, and the ledger: what of the KV memory nobody needs goes to what is kept for later requests."""
    info = model.info
    prefix_reuse = PrefixReuse(info.kv_bytes_per_token, info.digest, model.make_store(), on=options.prefix_cache)
    limit = info.kv_memory // info.kv_bytes_per_token
    ledger = KVLedger(limit, partial(keep_for_later, model.eyes, prefix_reuse, limit // SHARE))
    if (eyes := model.eyes) is not None:
        ledger.register("pictures", lambda: eyes.awaited_cells)
    return prefix_reuse, ledger


def warmed(
    model: ResidentModel,
    policies: PolicyTable,
    traces: Traces,
    cells: int,
    mailbox: queue.SimpleQueue[Command],
    clock: Callable[[], float],
    *,
    on: bool,
) -> None:
    """Runs shapes of a first batch as far as `WARM_S` allow, if that is `on`, where steps are traced or kernels made.
    The only thing that anybody may send meanwhile is that the engine shall stop."""
    if on and model.head is None and (model.compiles or mx.default_device() != mx.cpu):
        warm_up = WarmUp(model, policies.routed, policies.router(BASE_SET), traces, cells, policies.limit, clock)
        warm_up.run(lambda: not mailbox.empty())


def requests_of(model: ResidentModel, ledger: KVLedger) -> RequestQueue:
    """The queue; prompts that are kept for what waits in it fill KV."""
    cells = partial(model.make_store().minimum_cells, 1)
    requests = RequestQueue(model.info.max_batch, cells, *([] if model.eyes is None else [model.eyes.sight]))
    ledger.register("prompts", requests.kept_cells)
    return requests


def batches_of(
    model: ResidentModel,
    policies: PolicyTable,
    prefix_reuse: PrefixReuse,
    ledger: KVLedger,
    reports: Reports,
    blame: Blame,
    traces: Traces,
    timeline: Timeline,
    clock: Callable[[], float],
) -> Batches:
    """Rows of every parameter set; what their steps cost can be measured where they have columns. `traces` are those of
    the base."""

    def measured(width: int) -> StepCosts:
        return measure(model.forward, model.make_padded, policies.router(BASE_SET), width, clock)

    return Batches(
        partial(batch_of, model, policies, prefix_reuse, ledger, traces, timeline),
        model.make_store(),
        ledger,
        reports,
        blame,
        # Where each row reads its own columns, one bucket is as fast as several.
        measured if model.info.cache == "slots" and model.attention.attend is None else None,
    )


def budget_of(
    model: ResidentModel,
    policies: PolicyTable,
    ledger: KVLedger,
    clock: Callable[[], float],
    options: EngineOptions,
) -> TurnBudget:
    """What a turn reads; what that costs can be measured where there is room for it."""
    most = options.prefill_tokens or model.info.prefill_tokens

    def measured(most: int) -> list[tuple[int, float]]:
        longest = min(most, model.info.max_model_len)
        if model.info.cache != "slots" or not ledger.fits(cells_of(longest)):
            return []
        return readings(model.forward, model.make_padded, policies.router(BASE_SET), longest, clock)

    rounded = planned if model.compiles else None
    return TurnBudget(most, clock, rounded, prefer=options.prefer, measure=measured)


def batch_of(
    model: ResidentModel,
    policies: PolicyTable,
    prefix_reuse: PrefixReuse,
    ledger: KVLedger,
    traces: Traces,
    timeline: Timeline,
    parameters: int,
) -> Batch:
    """An empty batch whose forwards run on a parameter set. `traces` are the base's; since they hold weights, those of
    other sets go with their batch."""
    store, route = model.make_store(), policies.router(parameters)
    decode: Forward = model.forward
    if isinstance(store, PaddedKV):
        own = traces if parameters == BASE_SET else Traces()
        decode = CompiledDecode(model.forward, store, policies.routed, own) if model.compiles else decode
    eos, vocabulary = frozenset(model.info.eos_token_ids), model.info.vocab_size
    return Batch(
        model.forward,
        store,
        Decoder(decode, store, route, eos, vocabulary, model.filter_kernel, timeline=timeline, ranks=model.ranks),
        route,
        lambda placement: policies.route_rows([placement]),
        model.tokenizer,
        ledger,
        prefix_reuse.of_batch(store, eos),
        timeline=timeline,
    )
