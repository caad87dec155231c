"""Builds the engine: who works with whom. Everything is made from what it needs, so nothing here is named before it is
there."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from adapters.placement import BASE_SET
from rollout_server.engine.batch.batch import Batch
from rollout_server.engine.batch.batches import Batches
from rollout_server.engine.batch.decoder import Decoder
from rollout_server.engine.batch.length_buckets import StepCosts, measure
from rollout_server.engine.batch.prefix_reuse import BatchPrefixes, PrefixReuse
from rollout_server.engine.blame import Blame
from rollout_server.engine.kv_cache.ledger import KVLedger
from rollout_server.engine.kv_cache.padded import PaddedKV
from rollout_server.engine.kv_cache.sizes import planned
from rollout_server.engine.kv_cache.store import Forward
from rollout_server.engine.loop import Engine
from rollout_server.engine.messages.rollouts import Command, Event
from rollout_server.engine.messages.status import EngineStatus
from rollout_server.engine.messages.versions import PolicyCommand
from rollout_server.engine.model.compiled import CompiledDecode
from rollout_server.engine.model.device import device_fault
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.policies.table import PolicyTable
from rollout_server.engine.requests.queue import RequestQueue
from rollout_server.engine.requests.reports import Reports
from rollout_server.engine.scheduling.admission import AdmissionControl
from rollout_server.engine.scheduling.idle_memory import Memory
from rollout_server.engine.scheduling.on_update import VersionSwitcher
from rollout_server.engine.scheduling.pause import PauseState
from rollout_server.engine.scheduling.preemption import Preemption
from rollout_server.engine.scheduling.turn_budget import TurnBudget
from rollout_server.engine.scoring.queue import ScoringQueue, make_reader
from rollout_server.engine.scoring.tasks import ScoringTasks
from rollout_server.engine.status_board import StatusBoard


def build_engine(
    model: ResidentModel,
    policies: PolicyTable,
    mailbox: queue.SimpleQueue[Command],
    post: Callable[[list[Event]], None],
    show: Callable[[EngineStatus], None],
    *,
    prefill_tokens: int,
    prefix_cache: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    device_fault: Callable[[], str | None] = device_fault,
) -> Engine:
    """`post` carries events out, `show` replaces the status snapshot; both are thread-safe. `clock` is in seconds;
    `device_fault` says what is wrong with the device, after a step that failed."""
    info, blame = model.info, Blame()
    eos = frozenset(info.eos_token_ids)
    changes: deque[PolicyCommand] = deque()
    prefix_reuse = PrefixReuse(info.kv_bytes_per_token, info.digest, on=prefix_cache and info.cache == "slots")
    ledger = KVLedger(info.kv_memory // info.kv_bytes_per_token, prefix_reuse.fit)
    requests = requests_of(model, ledger)
    reports = Reports(requests, policies)
    batches = batches_of(model, policies, prefix_reuse, ledger, reports, blame)
    scoring = ScoringQueue(make_reader(model, policies), policies, ledger, blame)
    tasks = ScoringTasks(scoring, policies, reports, eos, info.embedding.pooling)
    preemption = Preemption(batches, policies, reports, requests, ledger)
    pause_state = PauseState(reports)
    memory = Memory(batches, policies, prefix_reuse, requests, scoring, info)
    return Engine(
        mailbox,
        post,
        policies=policies,
        changes=changes,
        requests=requests,
        reports=reports,
        admission=AdmissionControl(policies, batches, ledger, requests, reports, tasks, changes, blame),
        batches=batches,
        scoring=scoring,
        tasks=tasks,
        preemption=preemption,
        switcher=VersionSwitcher(policies, batches, reports, preemption),
        budget=TurnBudget(prefill_tokens, clock, planned if model.compiles else lambda tokens: tokens),
        pause_state=pause_state,
        memory=memory,
        prefix_reuse=prefix_reuse,
        ledger=ledger,
        status=StatusBoard(show, requests, batches, reports, policies, preemption, pause_state, prefix_reuse, memory),
        blame=blame,
        device_fault=device_fault,
    )


def requests_of(model: ResidentModel, ledger: KVLedger) -> RequestQueue:
    """The queue; prompts that are kept for what waits in it fill KV."""
    requests = RequestQueue(model.info.max_batch, partial(model.make_store().minimum_cells, 1))
    ledger.register("prompts", lambda: requests.kept_cells)
    return requests


def batches_of(
    model: ResidentModel,
    policies: PolicyTable,
    prefix_reuse: PrefixReuse,
    ledger: KVLedger,
    reports: Reports,
    blame: Blame,
) -> Batches:
    """Rows of every parameter set; what their steps cost can be measured where they have columns."""

    def measured(width: int) -> StepCosts:
        return measure(model.forward, model.make_padded, policies.router(BASE_SET), width)

    return Batches(
        partial(batch_of, model, policies, prefix_reuse, ledger),
        model.make_store(),
        ledger,
        reports,
        blame,
        # Where each row reads its own columns, one bucket is as fast as several.
        measured if model.info.cache == "slots" and model.attention.attend is None else None,
    )


def batch_of(
    model: ResidentModel, policies: PolicyTable, prefix_reuse: PrefixReuse, ledger: KVLedger, parameters: int
) -> Batch:
    """An empty batch whose forwards run on a parameter set."""
    store, route = model.make_store(), policies.router(parameters)
    prefixes = None
    decode: Forward = model.forward
    if isinstance(store, PaddedKV):
        decode = CompiledDecode(model.forward, store, policies.routed) if model.compiles else decode
        prefixes = BatchPrefixes(store, prefix_reuse) if prefix_reuse.on else None
    eos, vocabulary = frozenset(model.info.eos_token_ids), model.info.vocab_size
    # Copies of rows that left are made behind the step that was in flight then.
    before_read = prefixes.finish if prefixes is not None else lambda: None
    return Batch(
        model.forward,
        store,
        Decoder(decode, store, route, eos, vocabulary, before_read, model.filter_kernel),
        route,
        lambda placement: policies.route_rows([placement]),
        model.tokenizer,
        ledger,
        prefixes,
    )
