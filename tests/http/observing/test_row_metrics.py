"""Metrics of rows and versions, the same under vLLM's names, and the dashboard that is drawn of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litestar.testing import TestClient
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from rollout_server.http.observing.version_totals import MOST_VERSIONS
from rollout_server.http.observing.vllm_names import ALIASES, vllm_names
from rollout_server.rollout import FinishReason
from tests.http.test_metrics import Samples, read
from tests.support.http.fake_engine import FakeEngine, Row, logprob

Client = TestClient[Any]
DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana" / "rollout-server.json"
BASE = {"model": "base"}
VLLM = {"model_name": "org/tiny", "engine": "0"}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def sample(client: Client, policy: str = "base", **fields: Any) -> None:
    body = {"policy": policy, "prompts": [{"token_ids": [1, 2, 3]}], **fields}
    assert client.post("/v1/rollouts", json=body).status_code == 200


def test_rows_are_counted_and_timed(client: Client, engine: FakeEngine) -> None:
    """The script's rows wait 1 ms, are prefilled in 2 and decode in 3."""
    engine.script = lambda request, index: Row([60, 61, 62], FinishReason.STOP if index else FinishReason.LENGTH, 62)
    sample(client, n=3)
    samples = read(client)
    assert value(samples, "rollout_rows_total", finish_reason="stop", **BASE) == 2
    assert value(samples, "rollout_rows_total", finish_reason="length", **BASE) == 1
    assert value(samples, "rollout_prompt_tokens_total", **BASE) == 3, "once for all samples"
    for phase, seconds in (("queue", 0.001), ("prefill", 0.002), ("decode", 0.003)):
        assert abs(value(samples, "rollout_row_phase_seconds_sum", phase=phase, **BASE) - 3 * seconds) < 1e-9
    assert abs(value(samples, "rollout_time_to_first_token_seconds_sum", **BASE) - 3 * 0.004) < 1e-9
    assert abs(value(samples, "rollout_inter_token_seconds_sum", **BASE) - 3 * 0.001) < 1e-9, "2 ms for two tokens"
    assert value(samples, "rollout_row_tokens_sum", **BASE) == 9
    assert value(samples, "rollout_row_staleness_versions_bucket", le="0.0", **BASE) == 3


def test_a_row_without_a_token_has_no_times(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda request, index: Row([60] if index else [], FinishReason.ABORTED, "timeout")
    sample(client, n=2)
    samples = read(client)
    assert value(samples, "rollout_rows_total", finish_reason="aborted", **BASE) == 2
    assert value(samples, "rollout_time_to_first_token_seconds_count", **BASE) == 1
    assert ("rollout_inter_token_seconds_count", frozenset(BASE.items())) not in samples


def test_versions_are_told_apart(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    sample(client, "policy@1", **{"return": ["entropy", "base_logprobs"]}, n=2)
    sample(client, "policy")
    samples = read(client)
    first, second = ({"policy": "policy", "version": number, **BASE} for number in "12")
    assert value(samples, "rollout_version_tokens_total", **first) == 6
    assert value(samples, "rollout_version_rows_total", **second) == 1
    assert value(samples, "rollout_version_staleness", **first) == 1
    assert value(samples, "rollout_version_staleness", **second) == 0
    assert value(samples, "rollout_version_entropy_nats", **first) == 0.5
    assert value(samples, "rollout_version_row_length_tokens", **first) == 3
    tokens = [(1 + 2 + 3 + index + at) % 26 + 60 for index in range(2) for at in range(3)]
    mean = sum(map(logprob, tokens)) / len(tokens)
    assert abs(value(samples, "rollout_version_logprob_nats", **first) - mean) < 1e-9
    assert value(samples, "rollout_version_kl_to_base_nats", **first) > 0
    assert ("rollout_version_kl_to_base_nats", frozenset(second.items())) not in samples, "nobody asked for it"


def test_a_run_of_many_versions_has_no_more_series_than_the_table(client: Client, engine: FakeEngine) -> None:
    for number in range(1, MOST_VERSIONS + 20):
        engine.add("policy", 1)
        sample(client, f"policy@{number}")
    numbers = {dict(labels)["version"] for name, labels in read(client) if name == "rollout_version_tokens_total"}
    assert len(numbers) == MOST_VERSIONS and str(MOST_VERSIONS + 19) in numbers


def test_refusals_are_counted_by_code(client: Client) -> None:
    client.post("/v1/rollouts", json={"policy": "nobody", "prompts": [{"text": "a"}]})
    client.post("/v1/rollouts", json={"made up by a client": 1})
    client.get("/v1/nothing"), client.get("/v1/weights%2Fa"), client.get("/v1/models")
    samples = read(client)
    counts = {
        dict(labels)["code"]: count for (name, labels), count in samples.items() if name == "rollout_refusals_total"
    }
    assert counts == {"unknown_policy": 1, "invalid_field": 2, "not_found": 1}


def test_what_vllm_has_too_has_its_names(client: Client, engine: FakeEngine) -> None:
    engine.script = lambda request, index: Row([60, 61], FinishReason.STOP if index else FinishReason.ABORTED, "abort")
    sample(client, n=2)
    samples = read(client)
    for alias, ours in (
        ("vllm:num_requests_running", value(samples, "rollout_rows_running", **BASE)),
        ("vllm:num_requests_waiting", 5 + 3),
        ("vllm:num_preemptions_total", value(samples, "rollout_preemptions_total", **BASE)),
        ("vllm:generation_tokens_total", value(samples, "rollout_tokens_total", **BASE)),
        ("vllm:prompt_tokens_total", 3),
        ("vllm:prefix_cache_hits_total", 700),
        ("vllm:prefix_cache_queries_total", value(samples, "rollout_prefix_asked_tokens_total", **BASE)),
        ("vllm:time_to_first_token_seconds_count", 2),
        ("vllm:request_prefill_time_seconds_sum", 2 * 0.002),
        ("vllm:e2e_request_latency_seconds_sum", 2 * 0.006),
        ("vllm:kv_cache_usage_perc", 0.25),
    ):
        assert abs(value(samples, alias, **VLLM) - ours) < 1e-9, alias
    assert value(samples, "vllm:request_success_total", finished_reason="stop", **VLLM) == 1
    assert value(samples, "vllm:request_success_total", finished_reason="abort", **VLLM) == 1
    names = {name for name, _ in samples}
    for alias in ALIASES:
        assert any(name.startswith(alias) for name in names), alias


def test_a_controller_of_prime_rl_finds_what_it_reads(client: Client) -> None:
    """Its collector keeps values by the label `engine`, and reads the capacity of KV memory from labels."""
    samples = read(client)
    (config,) = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert int(config["block_size"]) * int(config["num_gpu_blocks"]) == 64, "1024 bytes, 16 a token"
    assert config["engine"] == VLLM["engine"] and config["enable_prefix_caching"] == "True"
    assert value(samples, "vllm:cache_config_info", **config) == 1
    for name, expected in (("sum", 1.253), ("count", 4)):
        assert value(samples, f"vllm:inter_token_latency_seconds_{name}", **VLLM) == expected
    for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting", "num_preemptions_total"):
        assert f"vllm:{name}" in {found for found, _ in samples}, name


def test_models_are_engines_of_their_own_under_vllm_s_names() -> None:
    """A reader that keeps the last value of each engine mixes no two models."""
    running = GaugeMetricFamily("rollout_rows_running", "Rows.", labels=["model"])
    for model, count in (("base", 7), ("judge", 1), ("draft", 2)):
        running.add_metric([model], count)
    found = {family.name: family for family in vllm_names([running], ["base", "judge", "draft"], str.upper)}
    told = [
        (each.labels["engine"], each.labels["model_name"], each.value)
        for each in found["vllm:num_requests_running"].samples
    ]
    assert told == [("0", "BASE", 7), ("1", "JUDGE", 1), ("2", "DRAFT", 2)]


def test_every_help_text_is_a_phrase_of_its_own(client: Client, push: Callable[..., Any]) -> None:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        if family.name.startswith("rollout_"):
            assert family.documentation[0].isupper() or family.documentation[0].isdigit(), family.name
            assert family.documentation.endswith("."), family.name


def test_the_dashboard_names_metrics_that_there_are(
    client: Client, engine: FakeEngine, push: Callable[..., Any]
) -> None:
    push()
    sample(client, "policy", **{"return": ["entropy", "base_logprobs"]})
    client.get("/v1/nothing")
    samples = read(client)
    known = {name for name, _ in samples}
    labels = {name: {label for other, pairs in samples if other == name for label, _ in pairs} for name in known}
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 20
    for query in queries:
        named = re.findall(r"\b(?:rollout|vllm)[_:][a-z_]+", query)
        assert named and set(named) <= known, (query, set(named) - known)
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
        there = set.union(*(labels[name] for name in named))
        assert grouped <= there, (query, grouped - there)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places) and all(x + w <= 24 for x, _, w, _ in places)
