"""What `/metrics` says, in Prometheus' text format: counts and times of requests and pushes, and the engine's state.

The engine's numbers are read from its last snapshot when somebody asks, so they cost nothing in between; what rows took
and what versions sampled is noted in `observing/`. Label values come from here or are names of policies; nothing a
client makes up becomes a label.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, chain

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.messages.status import (
    GAP_BOUNDS,
    EngineStatus,
    MemoryStatus,
    PictureStatus,
    PrefixStatus,
    ReplicaStatus,
    TokenGaps,
)
from rollout_server.errors import RolloutError
from rollout_server.http.observing.row_metrics import RowMetrics
from rollout_server.http.observing.vllm_names import NameOf, vllm_names
from rollout_server.rollout import BASE

CONTENT_TYPE = "text/plain; version=0.0.4"
REQUEST_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
PUSH_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Bounds in seconds. A push takes milliseconds."""
METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})
STATES = ("starting", "ready", "stopping", "dead")
REPLICA_STATES = ("joining", "restoring", "live", "draining", "fenced", "dead")
PAUSES = ("wait", "keep", "abort")

OUTCOMES = ("scored", "failed")
MOST_REWARD_MODELS = 64
"""Names of reward models that are told: a trainer may push each under a name of its own."""


class Metrics:
    """One per application."""

    def __init__(self, engines: Mapping[str, EngineHandle]) -> None:
        """`engines` by what requests call their models, which is the value of the label `model`."""
        self._registry = CollectorRegistry()
        self._models = tuple(engines)
        self._registry.register(_EngineStates(engines))
        self.rows = RowMetrics(self._registry)
        self._requests = Histogram(
            "rollout_request_seconds",
            "Seconds until the reply to a request was sent.",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._pushes = Histogram(
            "rollout_push_seconds",
            "Seconds that each phase of an accepted push took: receive, validate, stage, activate, persist.",
            ("model", "phase"),
            buckets=PUSH_BUCKETS,
            registry=self._registry,
        )
        self._push_bytes = Counter(
            "rollout_push_bytes", "Bytes of adapters in accepted pushes.", ("model",), registry=self._registry
        )

        self._refusals = Counter(
            "rollout_refusals", "Replies that are an error, by its code.", ("code",), registry=self._registry
        )
        self._rewards = Histogram(
            "rollout_reward_seconds",
            "Seconds from the end of a row until its reward was there, or had failed.",
            ("reward_model", "outcome"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._reward_models: OrderedDict[str, None] = OrderedDict()
        """Names whose rewards are told, the one that was used last behind the others."""

    def request(self, method: str, route: str | None, status: int, seconds: float, refused: str | None = None) -> None:
        """`route` is the template of the path, None where there is no such route; `refused` the code of an error."""
        if refused is not None:
            self._refusals.labels(refused).inc()
        method = method if method in METHODS else "other"
        self._requests.labels(method, route or "none", str(status)).observe(seconds)

    def push(self, timings_ms: Mapping[str, float], nbytes: int, model: str) -> None:
        """Counts an accepted push of a version of `model`; `timings_ms` are those of its reply."""
        for phase, milliseconds in timings_ms.items():
            self._pushes.labels(model, phase).observe(milliseconds / 1e3)
        self._push_bytes.labels(model).inc(nbytes)

    def reward(self, seconds: float, model: str, *, scored: bool) -> None:
        """Counts the reward of a row that has ended, or its failure; `model` is the name of what was to score it, which
        has to be there. The name that was used longest ago makes room for a new one."""
        if model not in self._reward_models:
            for outcome in OUTCOMES:
                self._rewards.labels(model, outcome)
        self._reward_models[model] = None
        self._reward_models.move_to_end(model)
        while len(self._reward_models) > MOST_REWARD_MODELS:
            gone, _ = self._reward_models.popitem(last=False)
            for outcome in OUTCOMES:
                self._rewards.remove(gone, outcome)
        self._rewards.labels(model, OUTCOMES[0] if scored else OUTCOMES[1]).observe(seconds)

    def text(self, name_of: NameOf = lambda model: model) -> bytes:
        """All of it, and what vLLM has too under vLLM's names; `name_of` says what requests call a model."""
        families = list(self._registry.collect())
        return generate_latest(_Collected([*families, *vllm_names(families, self._models, name_of)]))


class _Collected(Collector):
    """Families that were collected already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _memory(memory: MemoryStatus) -> Metric:
    """`part` is the name of the field: weights, kv_limit, kv_held, kv_filled, kv_kept, kv_prompts, kv_scored,
    kv_pictures, slots, sets, active, cached, peak."""
    gauge = GaugeMetricFamily("rollout_memory_bytes", "Device memory by category.", labels=["part"])
    for part in fields(memory):
        gauge.add_metric([part.name], getattr(memory, part.name))
    return gauge


class _EngineStates(Collector):
    """What every engine says of itself, under the label of its model."""

    def __init__(self, engines: Mapping[str, EngineHandle]) -> None:
        self._engines = engines

    def describe(self) -> Iterable[Metric]:
        """Nothing to ask for when it is registered: no engine has been started then."""
        return ()

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for model, engine in self._engines.items():
            status = engine.status
            for family in chain(_families(status), _kv_tokens(_info(engine), status)):
                samples = [each._replace(labels={"model": model, **each.labels}) for each in family.samples]
                family.samples = families[family.name].samples + samples if family.name in families else samples
                families[family.name] = family
        return families.values()


def _info(engine: EngineHandle) -> ModelInfo | None:
    """What was loaded; None while it is loading."""
    try:
        return engine.info
    except RolloutError:
        return None


def _families(status: EngineStatus) -> Iterable[Metric]:
    state = GaugeMetricFamily("rollout_engine_state", "1 for the state the engine is in.", labels=["state"])
    for name in STATES:
        state.add_metric([name], float(status.state == name))
    yield state
    paused = GaugeMetricFamily("rollout_paused", "1 for the mode of the pause.", labels=["mode"])
    for name in PAUSES:
        paused.add_metric([name], float(status.paused == name))
    yield paused
    yield GaugeMetricFamily("rollout_requests_waiting", "Requests that wait in the queue.", value=status.waiting)
    yield GaugeMetricFamily("rollout_rows_waiting", "Samples that wait in the queue.", value=status.waiting_rows)
    yield GaugeMetricFamily("rollout_rows_running", "Rows in a batch.", value=status.running)
    yield GaugeMetricFamily("rollout_rows_aside", "Preempted rows that wait for KV memory.", value=status.preempted)
    yield CounterMetricFamily("rollout_preemptions", "Rows preempted since the start.", value=status.preemptions)
    yield CounterMetricFamily("rollout_steps", "Decode steps since the start.", value=status.steps)
    yield CounterMetricFamily("rollout_tokens", "Tokens sampled since the start.", value=status.tokens)
    yield _gaps(status.gaps)
    yield GaugeMetricFamily("rollout_slot_bytes", "Device memory of adapter slots.", value=status.slot_bytes)
    yield GaugeMetricFamily("rollout_parameter_sets", "Parameter sets beside the base.", value=status.sets)
    yield GaugeMetricFamily("rollout_set_bytes", "Device memory of parameter sets.", value=status.set_bytes)
    yield from _prefixes(status.prefix)
    yield _memory(status.memory)
    yield from _pictures(status.pictures)
    versions = GaugeMetricFamily("rollout_versions", "Versions that are kept of each policy.", labels=["policy"])
    live = GaugeMetricFamily("rollout_live_version", "Number of the live version; 0 for none.", labels=["policy"])
    rows = GaugeMetricFamily("rollout_policy_rows", "Rows that use versions of each policy.", labels=["policy"])
    nbytes = GaugeMetricFamily("rollout_weights_bytes", "Bytes of kept versions, as sent.", labels=["policy"])
    resident = GaugeMetricFamily(
        "rollout_resident_bytes", "Device memory of kept versions; equal contents share it.", labels=["policy"]
    )
    for policy in status.policies:
        if policy.name == BASE:
            continue
        versions.add_metric([policy.name], len(policy.versions))
        live.add_metric([policy.name], policy.live.number if policy.live else 0)
        rows.add_metric([policy.name], sum(version.rows_in_use for version in policy.versions))
        nbytes.add_metric([policy.name], sum(version.nbytes for version in policy.versions))
        resident.add_metric([policy.name], sum(version.resident_bytes for version in policy.versions))
    yield from (versions, live, rows, nbytes, resident)
    yield from _replicas(status.replicas)


def _gaps(gaps: TokenGaps) -> Metric:
    up_to = [*map(str, GAP_BOUNDS), "+Inf"]
    found = HistogramMetricFamily(
        "rollout_token_gap_seconds", "Seconds from one token of a row to its next, stalls included, each gap counted."
    )
    found.add_metric([], list(zip(up_to, accumulate(gaps.counts), strict=True)), gaps.seconds)
    return found


def _kv_tokens(info: ModelInfo | None, status: EngineStatus) -> Iterable[Metric]:
    """Nothing for a model that keeps no KV, or that is not loaded. What every row takes whatever its length is left
    out."""
    if info is None or not info.kv_bytes_per_token:
        return
    fixed = info.kv_bytes_per_row * info.max_batch * max(1, len(status.replicas))
    tokens = max(0, status.memory.kv_limit - fixed) // info.kv_bytes_per_token
    yield GaugeMetricFamily("rollout_kv_capacity_tokens", "Tokens that the memory for KV holds.", value=tokens)


def _replicas(replicas: Sequence[ReplicaStatus]) -> Iterable[Metric]:
    """Nothing where the server computes in its own process."""
    labels = ["replica"]
    state = GaugeMetricFamily(
        "rollout_replica_state", "1 for the state that a replica is in.", labels=["replica", "state"]
    )
    rows = GaugeMetricFamily("rollout_replica_rows", "Rows that a replica was given.", labels=labels)
    staged = GaugeMetricFamily("rollout_replica_versions", "Versions that a replica has staged.", labels=labels)
    seen = GaugeMetricFamily(
        "rollout_replica_silence_seconds", "Seconds since a replica's engine was heard of.", labels=labels
    )
    restarts = CounterMetricFamily("rollout_replica_restarts", "How often a replica was started again.", labels=labels)
    tokens = GaugeMetricFamily(
        "rollout_replica_tokens", "Tokens that a replica has sampled since its start.", labels=labels
    )
    for replica in replicas:
        for name in REPLICA_STATES:
            state.add_metric([replica.id, name], float(replica.state == name))
        rows.add_metric([replica.id], replica.rows)
        staged.add_metric([replica.id], replica.versions_staged)
        seen.add_metric([replica.id], replica.last_seen_s)
        restarts.add_metric([replica.id], replica.restarts)
        tokens.add_metric([replica.id], replica.tokens)
    if replicas:
        yield from (state, rows, staged, seen, restarts, tokens)


def _pictures(status: PictureStatus) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "rollout_pictures_kept", "Pictures whose features are kept for whoever shows them again.", value=status.kept
    )
    yield CounterMetricFamily(
        "rollout_pictures_read", "How often the tower read a picture since the start.", value=status.read
    )
    yield CounterMetricFamily(
        "rollout_picture_hits", "How often the features of a picture were there since the start.", value=status.hits
    )


def _prefixes(status: PrefixStatus) -> Iterable[Metric]:
    yield GaugeMetricFamily("rollout_prefix_cache", "1 if the prefix cache is on.", value=float(status.on))
    yield CounterMetricFamily(
        "rollout_prefix_hits", "Prompts of which the prefix cache held something.", value=status.hits
    )
    yield CounterMetricFamily(
        "rollout_prefix_misses", "Prompts of which the prefix cache held nothing.", value=status.misses
    )
    yield CounterMetricFamily(
        "rollout_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", value=status.hit_tokens
    )
    yield CounterMetricFamily(
        "rollout_prefix_asked_tokens",
        "Tokens of prompts that were looked up in the prefix cache.",
        value=status.asked_tokens,
    )
    yield GaugeMetricFamily(
        "rollout_prefix_bytes", "KV and recurrent states in the prefix cache, in bytes.", value=status.nbytes
    )
    yield CounterMetricFamily("rollout_prefix_evictions", "Prefix-cache nodes evicted.", value=status.evictions)
