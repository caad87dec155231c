"""`/metrics`: what is counted, and that nothing a client makes up becomes a label."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from rollout_server.http.metrics import MOST_REWARD_MODELS, Metrics
from tests.support.http.fake_engine import FakeEngine

Client = TestClient[Any]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(client: Client) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """What an engine or a push counts is counted for a model."""
    own = {} if name.startswith("rollout_request_seconds") else {"model": "base"}
    return samples[name, frozenset((own | labels).items())]


def test_the_engine_s_state(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 3)
    engine.registry.acquire("policy", 2, rows=4)
    samples = read(client)
    assert value(samples, "rollout_engine_state", state="ready") == 1
    assert value(samples, "rollout_engine_state", state="dead") == 0
    assert value(samples, "rollout_rows_running") == 2
    assert value(samples, "rollout_requests_waiting") == 0
    assert value(samples, "rollout_rows_waiting") == 5
    assert value(samples, "rollout_token_gap_seconds_bucket", le="0.001") == 3
    assert value(samples, "rollout_token_gap_seconds_bucket", le="2.0") == 4, "a stall of more than a second"
    assert value(samples, "rollout_token_gap_seconds_sum") == 1.253
    assert value(samples, "rollout_kv_capacity_tokens") == 1024 // 16
    assert (value(samples, "rollout_steps_total"), value(samples, "rollout_tokens_total")) == (3, 4)
    assert value(samples, "rollout_rows_aside") == 3 and value(samples, "rollout_preemptions_total") == 4
    prefixes = {"prefix_hits_total": 5, "prefix_misses_total": 6, "prefix_hit_tokens_total": 700}
    for name, expected in (prefixes | {"prefix_cache": 1, "prefix_bytes": 800, "prefix_evictions_total": 9}).items():
        assert value(samples, f"rollout_{name}") == expected, name
    for name, expected in (("pictures_kept", 2), ("pictures_read_total", 11), ("picture_hits_total", 12)):
        assert value(samples, f"rollout_{name}") == expected, name
    parts = {"weights": 4000, "kv_held": 512, "kv_filled": 256, "kv_pictures": 64, "cached": 0, "peak": 9000}
    for part, expected in parts.items():
        assert value(samples, "rollout_memory_bytes", part=part) == expected, part
    for name, expected in (("versions", 3), ("live_version", 3), ("policy_rows", 4), ("weights_bytes", 192)):
        assert value(samples, f"rollout_{name}", policy="policy") == expected, name
    client.delete("/v1/weights/policy")
    assert not any(dict(labels).get("policy") for _, labels in read(client))


def test_a_push_is_split_into_its_phases(client: Client, push: Callable[..., Any]) -> None:
    reply = push().json()
    samples = read(client)
    for phase, milliseconds in reply["timings_ms"].items():
        assert value(samples, "rollout_push_seconds_count", phase=phase) == 1
        assert abs(value(samples, "rollout_push_seconds_sum", phase=phase) - milliseconds / 1e3) < 1e-9
    assert value(samples, "rollout_push_seconds_bucket", phase="stage", le="0.001") == 0
    assert value(samples, "rollout_push_seconds_bucket", phase="stage", le="0.002") == 1, "1.5 ms"
    assert value(samples, "rollout_push_bytes_total") == reply["bytes"]
    push(config=None)  # refused
    assert value(read(client), "rollout_push_seconds_count", phase="stage") == 1


def test_requests_are_counted_by_route_and_status(client: Client, engine: FakeEngine) -> None:
    engine.add("policy", 2)
    for name in ("policy", "policy", "nobody"):
        client.get(f"/v1/weights/{name}")
    for path in ("/v1/nothing", "/v1/secret-1", "/v1/weights/a/b/c/d"):
        client.get(path)
    client.request("BREW", "/v1/models")
    samples = read(client)

    def count(route: str, status: str, method: str = "GET") -> float:
        return value(samples, "rollout_request_seconds_count", method=method, route=route, status=status)

    assert count("/v1/weights/{name}", "200") == 2
    assert count("/v1/weights/{name}", "404") == 1
    assert count("none", "404") == 3
    labels = {text for _, pairs in samples for _, text in pairs}
    assert "BREW" not in labels and not any("secret" in text or "nobody" in text for text in labels)


def test_as_many_reward_models_are_told_as_there_is_room_for(engine: FakeEngine) -> None:
    """The one that was used longest ago is told no more; whoever comes back begins anew."""
    metrics = Metrics({"base": engine})  # type: ignore[dict-item]
    for number in range(MOST_REWARD_MODELS + 1):
        metrics.reward(1.0, f"rm-{number}", scored=True)
        metrics.reward(1.0, "kept", scored=number % 2 == 0)
    text = metrics.text().decode()
    told = set(re.findall(r'reward_model="([^"]*)"', text))
    assert told == {"kept", *(f"rm-{number}" for number in range(2, MOST_REWARD_MODELS + 1))}
    assert 'rollout_reward_seconds_count{outcome="scored",reward_model="kept"} 33.0' in text
    metrics.reward(1.0, "rm-0", scored=False)
    assert 'rollout_reward_seconds_count{outcome="failed",reward_model="rm-0"} 1.0' in metrics.text().decode()
