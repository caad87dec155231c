"""Metrics of rows that have ended: how long each part took, what came of them, and what each version sampled.

Label values are names of models and policies, numbers of versions, and words of ours. Of versions there are as many as
their table holds: one that has made room for others is told no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rollout_server.engine.messages.status import GAP_BOUNDS
from rollout_server.http.observing.version_totals import VersionTable, VersionTotals
from rollout_server.rollout import Rollout

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
TOKENS = tuple(2**power for power in range(18))
STALENESS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)


class RowMetrics:
    """One per application; `ended` is told of every row of every model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tables: dict[str, VersionTable] = {}
        registry.register(_Versions(self._tables))

        def histogram(name: str, says: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(name, says, ("model", *labels), buckets=tuple(buckets), registry=registry)

        self._first = histogram(
            "rollout_time_to_first_token_seconds", "Seconds from a row's arrival to its first token.", SECONDS
        )
        self._between = histogram(
            "rollout_inter_token_seconds",
            "Mean seconds between two tokens of a row, once for each row; rollout_token_gap_seconds has every gap.",
            GAP_BOUNDS,
        )
        self._whole = histogram("rollout_row_seconds", "Seconds from a row's arrival to its end.", SECONDS)
        self._phases = histogram(
            "rollout_row_phase_seconds", "Seconds of a row in the queue, in prefill and in decode.", SECONDS, "phase"
        )
        self._tokens = histogram("rollout_row_tokens", "Tokens that a row sampled.", TOKENS)
        self._staleness = histogram(
            "rollout_row_staleness_versions",
            "By how many versions the live one was ahead of the oldest that sampled in a row, when the row ended.",
            STALENESS,
        )
        self._rows = Counter(
            "rollout_rows", "Rows that have ended, by the reason.", ("model", "finish_reason"), registry=registry
        )
        self._prompts = Counter(
            "rollout_prompt_tokens",
            "Tokens of prompts, each counted once whatever its n.",
            ("model",),
            registry=registry,
        )

    def follow(self, model: str, versions: VersionTable) -> None:
        """Tells from now on what the table of a model holds."""
        self._tables[model] = versions

    def ended(self, model: str, rollout: Rollout, staleness: int) -> None:
        timings, sampled = rollout.timings, rollout.sampled
        self._rows.labels(model, str(rollout.finish_reason)).inc()
        if rollout.sample_index == 0:
            self._prompts.labels(model).inc(len(rollout.prompt_ids))
        if not sampled:
            return
        phases = {"queue": timings.queued_ms, "prefill": timings.prefill_ms, "decode": timings.decode_ms}
        for phase, milliseconds in phases.items():
            self._phases.labels(model, phase).observe(milliseconds / 1e3)
        whole = sum(phases.values()) / 1e3
        self._whole.labels(model).observe(whole)
        self._tokens.labels(model).observe(sampled)
        self._staleness.labels(model).observe(staleness)
        first = timings.first_token_ms
        if first is not None:
            self._first.labels(model).observe(first / 1e3)
            if sampled > 1:
                self._between.labels(model).observe(max(0.0, whole - first / 1e3) / (sampled - 1))


def _mean(total: int, count: int) -> float | None:
    return total / count if count else None


VERSION_GAUGES: tuple[tuple[str, str, Callable[[VersionTotals], float | None]], ...] = (
    (
        "rollout_version_entropy_nats",
        "Mean entropy of a version's tokens, over rows that asked for it.",
        lambda totals: totals.entropy.value,
    ),
    (
        "rollout_version_logprob_nats",
        "Mean log-probability of a version's tokens.",
        lambda totals: totals.logprobs.value,
    ),
    (
        "rollout_version_kl_to_base_nats",
        "Mean of log pi minus log base of a version's tokens, over rows that asked for base_logprobs.",
        lambda totals: totals.log_ratio.value,
    ),
    (
        "rollout_version_row_length_tokens",
        "Mean length of the rows that ended under a version.",
        lambda totals: _mean(totals.row_tokens, totals.rows),
    ),
    (
        "rollout_version_staleness",
        "Mean number of versions by which the live one was ahead when a version's rows ended.",
        lambda totals: _mean(totals.staleness, totals.rows),
    ),
)


class _Versions(Collector):
    def __init__(self, tables: dict[str, VersionTable]) -> None:
        self._tables = tables

    def describe(self) -> Iterable[Metric]:
        """Nothing to ask for when it is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        names = ["model", "policy", "version"]
        tokens = CounterMetricFamily("rollout_version_tokens", "Tokens that a version sampled.", labels=names)
        rows = CounterMetricFamily("rollout_version_rows", "Rows that ended under a version.", labels=names)
        gauges = [GaugeMetricFamily(name, says, labels=names) for name, says, _ in VERSION_GAUGES]
        for model, table in self._tables.items():
            for totals in table:
                labels = [model, totals.version.name, str(totals.version.number)]
                tokens.add_metric(labels, totals.tokens)
                rows.add_metric(labels, totals.rows)
                for gauge, (_, _, of) in zip(gauges, VERSION_GAUGES, strict=True):
                    if (value := of(totals)) is not None:
                        gauge.add_metric(labels, value)
        return [tokens, rows, *gauges]
