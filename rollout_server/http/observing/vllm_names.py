"""Metrics under the names that vLLM gives to what means the same, for dashboards and controllers that read those.

Names and meanings: vLLM's `vllm/v1/metrics/loggers.py`. What it calls a request is a row here where it is timed or
counted, since it makes one of each sample: what waits is every sample that has no place, preempted ones included. The
label `engine` counts the models of this server, so that a reader who keeps one value of each engine mixes no two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

from rollout_server.engine.messages.options import KV_BUCKET

ALIASES: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "vllm:num_requests_running": ("rollout_rows_running", {}),
        "vllm:num_preemptions": ("rollout_preemptions", {}),
        "vllm:generation_tokens": ("rollout_tokens", {}),
        "vllm:prompt_tokens": ("rollout_prompt_tokens", {}),
        "vllm:prefix_cache_queries": ("rollout_prefix_asked_tokens", {}),
        "vllm:prefix_cache_hits": ("rollout_prefix_hit_tokens", {}),
        "vllm:time_to_first_token_seconds": ("rollout_time_to_first_token_seconds", {}),
        "vllm:inter_token_latency_seconds": ("rollout_token_gap_seconds", {}),
        "vllm:request_time_per_output_token_seconds": ("rollout_inter_token_seconds", {}),
        "vllm:e2e_request_latency_seconds": ("rollout_row_seconds", {}),
        "vllm:request_queue_time_seconds": ("rollout_row_phase_seconds", {"phase": "queue"}),
        "vllm:request_prefill_time_seconds": ("rollout_row_phase_seconds", {"phase": "prefill"}),
        "vllm:request_decode_time_seconds": ("rollout_row_phase_seconds", {"phase": "decode"}),
        "vllm:request_generation_tokens": ("rollout_row_tokens", {}),
    }
)
"""vLLM's name, without `_total` → ours, and the labels that choose among its samples."""
FINISHED: Mapping[str, str] = MappingProxyType({"stop": "stop", "length": "length", "aborted": "abort"})
"""Reasons → vLLM's words. Others it does not have."""
BASE_MODEL = "base"
VLLM_LABELS = ("model_name", "engine")

NameOf = Callable[[str], str]
"""Returns what requests call a model, given the value of the label `model`."""


def vllm_names(families: Iterable[Metric], models: Sequence[str], name_of: NameOf) -> Iterator[Metric]:
    """The families that vLLM has too, under its names and labels. `models` are the values of the label `model`, in the
    order in which they are engines 0, 1, …"""
    known = {family.name: family for family in families}
    labels = _Labels(models, name_of)
    for alias, (name, chosen) in ALIASES.items():
        if (family := known.get(name)) is not None:
            yield _renamed(family, alias, chosen, labels)
    yield _waiting(known, labels)
    yield from _cache_config(known, labels)
    if (rows := known.get("rollout_rows")) is not None:
        yield _finished(rows, labels)
    if (memory := known.get("rollout_memory_bytes")) is not None:
        yield _kv_usage(memory, labels)


class _Labels:
    """vLLM's two labels of a model."""

    def __init__(self, models: Sequence[str], name_of: NameOf) -> None:
        self._engines = {model: str(number) for number, model in enumerate(models)}
        self._name_of = name_of

    def engine(self, model: str) -> str:
        return self._engines.get(model, "0")

    def of(self, sample: Sample) -> dict[str, str]:
        model = _model(sample)
        return {"model_name": self._name_of(model), "engine": self.engine(model)}


def _model(sample: Sample) -> str:
    return sample.labels.get("model", BASE_MODEL)


def _values(family: Metric | None) -> dict[str, float]:
    """What a family of one sample a model says of each."""
    return {_model(sample): sample.value for sample in family.samples} if family else {}


def _renamed(family: Metric, alias: str, chosen: Mapping[str, str], labels: _Labels) -> Metric:
    renamed = Metric(alias, family.documentation, family.type)
    for sample in family.samples:
        if all(sample.labels.get(label) == value for label, value in chosen.items()):
            name = alias + sample.name.removeprefix(family.name)
            bound = {"le": sample.labels["le"]} if "le" in sample.labels else {}
            renamed.samples.append(sample._replace(name=name, labels=labels.of(sample) | bound))
    return renamed


def _waiting(known: Mapping[str, Metric], labels: _Labels) -> Metric:
    """vLLM puts what it preempts back among what waits."""
    waiting = GaugeMetricFamily(
        "vllm:num_requests_waiting", "Samples that wait for a place, preempted ones included.", labels=VLLM_LABELS
    )
    aside = _values(known.get("rollout_rows_aside"))
    for sample in known["rollout_rows_waiting"].samples if "rollout_rows_waiting" in known else ():
        waiting.add_metric([*labels.of(sample).values()], sample.value + aside.get(_model(sample), 0.0))
    return waiting


def _cache_config(known: Mapping[str, Metric], labels: _Labels) -> Iterator[Metric]:
    """How much the memory for keys and values holds, as labels of a 1: vLLM gives this one no name of a model."""
    tokens = _values(known.get("rollout_kv_capacity_tokens"))
    prefixes = _values(known.get("rollout_prefix_cache"))
    if not tokens:
        return
    config = GaugeMetricFamily(
        "vllm:cache_config_info",
        "The memory for keys and values: num_gpu_blocks blocks of block_size tokens.",
        labels=["engine", "block_size", "num_gpu_blocks", "enable_prefix_caching"],
    )
    for model, count in tokens.items():
        blocks = str(int(count) // KV_BUCKET)
        config.add_metric([labels.engine(model), str(KV_BUCKET), blocks, str(bool(prefixes.get(model)))], 1.0)
    yield config


def _finished(rows: Metric, labels: _Labels) -> Metric:
    found = CounterMetricFamily(
        "vllm:request_success",
        "Rows that have ended, by vLLM's word for why.",
        labels=[*VLLM_LABELS, "finished_reason"],
    )
    for sample in rows.samples:
        reason = FINISHED.get(sample.labels["finish_reason"])
        if sample.name == "rollout_rows_total" and reason is not None:
            found.add_metric([*labels.of(sample).values(), reason], sample.value)
    return found


def _kv_usage(memory: Metric, labels: _Labels) -> Metric:
    """What rows fill of the memory for keys and values. The prefix cache does not count: it gives way."""
    parts: dict[str, dict[str, Sample]] = {}
    for sample in memory.samples:
        parts.setdefault(_model(sample), {})[sample.labels["part"]] = sample
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc", "KV memory that rows have filled, 1 for all of it.", labels=VLLM_LABELS
    )
    for sizes in parts.values():
        limit, filled = sizes["kv_limit"], sizes["kv_filled"]
        usage.add_metric([*labels.of(limit).values()], filled.value / limit.value if limit.value else 0.0)
    return usage
