"""What `/metrics` says, in Prometheus' text format: counts and times of requests and pushes, and the engine's state.

The engine's numbers are read from its last snapshot when somebody asks, so they cost nothing in between. Label values
come from here or are names of policies; nothing a client makes up becomes a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server.engine.footprint import MemoryStatus
from rollout_server.engine.handle import EngineHandle
from rollout_server.engine.kept_prefixes import PrefixStatus
from rollout_server.rollout import BASE

CONTENT_TYPE = "text/plain; version=0.0.4"
REQUEST_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
PUSH_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""Seconds. A push is a matter of milliseconds."""
METHODS = frozenset({"GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS"})
STATES = ("starting", "ready", "stopping", "dead")
PAUSES = ("wait", "keep", "abort")


class Metrics:
    """One per application."""

    def __init__(self, engine: EngineHandle) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineState(engine))
        self._requests = Histogram(
            "rollout_request_seconds",
            "Requests and the time until their replies were sent; _count counts them.",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )
        self._pushes = Histogram(
            "rollout_push_seconds",
            "Pushes that were accepted, by phase: receive, validate, stage, activate, persist.",
            ("phase",),
            buckets=PUSH_BUCKETS,
            registry=self._registry,
        )
        self._push_bytes = Counter(
            "rollout_push_bytes", "Bytes of adapters that were accepted.", registry=self._registry
        )

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """`route` is the template of the path; None where there is no such route."""
        method = method if method in METHODS else "other"
        self._requests.labels(method, route or "none", str(status)).observe(seconds)

    def push(self, timings_ms: Mapping[str, float], nbytes: int) -> None:
        """Of one accepted push; `timings_ms` are those of its reply."""
        for phase, milliseconds in timings_ms.items():
            self._pushes.labels(phase).observe(milliseconds / 1e3)
        self._push_bytes.inc(nbytes)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _memory(memory: MemoryStatus) -> Metric:
    """`part` is the name of the field: weights, kv_limit, kv_held, kv_filled, kv_kept, kv_prompts, kv_scored, slots,
    sets, active, cached, peak."""
    gauge = GaugeMetricFamily("rollout_memory_bytes", "Device memory by what it is for.", labels=["part"])
    for part in fields(memory):
        gauge.add_metric([part.name], getattr(memory, part.name))
    return gauge


class _EngineState(Collector):
    def __init__(self, engine: EngineHandle) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Nothing to ask for when it is registered: the engine has not been started then."""
        return ()

    def collect(self) -> Iterable[Metric]:
        status = self._engine.status
        state = GaugeMetricFamily("rollout_engine_state", "1 for the state the engine is in.", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(status.state == name))
        yield state
        paused = GaugeMetricFamily("rollout_paused", "1 for the mode in which new work is held.", labels=["mode"])
        for name in PAUSES:
            paused.add_metric([name], float(status.paused == name))
        yield paused
        yield GaugeMetricFamily("rollout_requests_waiting", "Requests in the queue.", value=status.waiting)
        yield GaugeMetricFamily("rollout_rows_running", "Rows in the batch.", value=status.running)
        yield GaugeMetricFamily("rollout_rows_aside", "Rows that wait for KV memory to go on.", value=status.aside)
        yield CounterMetricFamily("rollout_preemptions", "Rows that gave their KV up.", value=status.preemptions)
        yield CounterMetricFamily("rollout_steps", "Decode steps since the start.", value=status.steps)
        yield CounterMetricFamily("rollout_tokens", "Tokens sampled since the start.", value=status.tokens)
        yield GaugeMetricFamily("rollout_slot_bytes", "Device memory of adapter slots.", value=status.slot_bytes)
        yield GaugeMetricFamily("rollout_parameter_sets", "Parameter sets beside the base.", value=status.sets)
        yield GaugeMetricFamily("rollout_set_bytes", "Device memory of parameter sets.", value=status.set_bytes)
        yield from _prefixes(status.prefix)
        yield _memory(status.memory)
        versions = GaugeMetricFamily("rollout_versions", "Kept versions.", labels=["policy"])
        live = GaugeMetricFamily("rollout_live_version", "Where the name points; 0 for nowhere.", labels=["policy"])
        rows = GaugeMetricFamily("rollout_policy_rows", "Rows that use kept versions.", labels=["policy"])
        nbytes = GaugeMetricFamily("rollout_weights_bytes", "Bytes of kept versions.", labels=["policy"])
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


def _prefixes(status: PrefixStatus) -> Iterable[Metric]:
    yield GaugeMetricFamily("rollout_prefix_cache", "1 if KV is kept for later requests.", value=float(status.on))
    yield CounterMetricFamily("rollout_prefix_hits", "Prompts of which some KV was kept.", value=status.hits)
    yield CounterMetricFamily("rollout_prefix_misses", "Prompts of which none was.", value=status.misses)
    yield CounterMetricFamily(
        "rollout_prefix_hit_tokens", "Prompt tokens that were not read again.", value=status.hit_tokens
    )
    yield GaugeMetricFamily("rollout_prefix_bytes", "KV kept for later requests.", value=status.nbytes)
    yield CounterMetricFamily("rollout_prefix_evictions", "Pieces of it that made room.", value=status.evictions)
