"""Traces: off unless wanted, a sentence where they cannot be had, and a span for a request where they can."""

from __future__ import annotations

import importlib.util

import pytest
from litestar.testing import TestClient

from rollout_server.config import ServerConfig
from rollout_server.errors import InvalidField
from rollout_server.http.app import create_app
from rollout_server.http.observing.tracing import tracing
from tests.support.http.fake_engine import FakeEngine

INSTALLED = importlib.util.find_spec("opentelemetry") is not None


def test_they_are_off_unless_wanted() -> None:
    assert tracing(on=False) == [] and ServerConfig().otel == "off"


@pytest.mark.skipif(INSTALLED, reason="OpenTelemetry is installed here")
def test_a_missing_extra_is_named(engine: FakeEngine) -> None:
    with pytest.raises(InvalidField, match=r"rollout-server\[otel\]"):
        create_app(ServerConfig(otel="on"), engine)  # type: ignore[arg-type]


@pytest.mark.skipif(not INSTALLED, reason="OpenTelemetry is not installed: pip install 'rollout-server[otel]'")
def test_a_request_is_a_span_without_its_body(engine: FakeEngine) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    with TestClient(create_app(ServerConfig(otel="on"), engine)) as client:  # type: ignore[arg-type]
        client.post("/v1/rollouts", json={"policy": "base", "prompts": [{"text": "private"}]})
    told = [span.to_json() for span in spans.get_finished_spans()]
    assert any("/v1/rollouts" in text for text in told) and not any("private" in text for text in told)
