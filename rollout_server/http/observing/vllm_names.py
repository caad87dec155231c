"""Metrics under the names that vLLM gives to what means the same, for dashboards and controllers that read those.

Names and meanings: vLLM's `vllm/v1/metrics/loggers.py`. What it calls a request is a row here where it is timed or
counted when it ends, since it makes one of each sample; requests that wait are those of this server, whatever their n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.samples import Sample

ALIASES: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "vllm:num_requests_running": ("rollout_rows_running", {}),
        "vllm:num_requests_waiting": ("rollout_requests_waiting", {}),
        "vllm:num_preemptions": ("rollout_preemptions", {}),
        "vllm:generation_tokens": ("rollout_tokens", {}),
        "vllm:prompt_tokens": ("rollout_prompt_tokens", {}),
        "vllm:prefix_cache_queries": ("rollout_prefix_asked_tokens", {}),
        "vllm:prefix_cache_hits": ("rollout_prefix_hit_tokens", {}),
        "vllm:time_to_first_token_seconds": ("rollout_time_to_first_token_seconds", {}),
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

NameOf = Callable[[str], str]
"""Returns what requests call a model, given the value of the label `model`."""


def vllm_names(families: Iterable[Metric], name_of: NameOf) -> Iterator[Metric]:
    """The families that vLLM has too, under its names and labels."""
    known = {family.name: family for family in families}
    for alias, (name, chosen) in ALIASES.items():
        if (family := known.get(name)) is not None:
            yield _renamed(family, alias, chosen, name_of)
    if (rows := known.get("rollout_rows")) is not None:
        yield _finished(rows, name_of)
    if (memory := known.get("rollout_memory_bytes")) is not None:
        yield _kv_usage(memory, name_of)


def _labels(sample: Sample, name_of: NameOf) -> dict[str, str]:
    """vLLM's two; `le` stays."""
    kept = {"le": sample.labels["le"]} if "le" in sample.labels else {}
    return {"model_name": name_of(sample.labels.get("model", BASE_MODEL)), "engine": "0", **kept}


def _renamed(family: Metric, alias: str, chosen: Mapping[str, str], name_of: NameOf) -> Metric:
    renamed = Metric(alias, family.documentation, family.type)
    for sample in family.samples:
        if all(sample.labels.get(label) == value for label, value in chosen.items()):
            name = alias + sample.name.removeprefix(family.name)
            renamed.samples.append(sample._replace(name=name, labels=_labels(sample, name_of)))
    return renamed


def _finished(rows: Metric, name_of: NameOf) -> Metric:
    labels = ["model_name", "engine", "finished_reason"]
    found = CounterMetricFamily("vllm:request_success", "Rows that have ended, by vLLM's word for why.", labels=labels)
    for sample in rows.samples:
        reason = FINISHED.get(sample.labels["finish_reason"])
        if sample.name == "rollout_rows_total" and reason is not None:
            found.add_metric([*_labels(sample, name_of).values(), reason], sample.value)
    return found


def _kv_usage(memory: Metric, name_of: NameOf) -> Metric:
    """What rows fill of the memory for keys and values. The prefix cache does not count: it gives way."""
    parts: dict[str, dict[str, float]] = {}
    for sample in memory.samples:
        parts.setdefault(sample.labels.get("model", BASE_MODEL), {})[sample.labels["part"]] = sample.value
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc", "KV memory that rows have filled, 1 for all of it.", labels=["model_name", "engine"]
    )
    for model, sizes in parts.items():
        limit = sizes.get("kv_limit", 0.0)
        usage.add_metric([name_of(model), "0"], sizes.get("kv_filled", 0.0) / limit if limit else 0.0)
    return usage
