"""Traces of requests by way of OpenTelemetry, where its packages are installed (the extra `otel`).

What spans are called and where they go is OpenTelemetry's own affair: `opentelemetry-instrument rollout-server serve
--otel on` reads OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_ENDPOINT and the like. Spans hold method, route, status and
times, and nothing of any body.
"""

from __future__ import annotations

from litestar.exceptions import MissingDependencyException
from litestar.plugins import InitPluginProtocol

from rollout_server.errors import InvalidField


def tracing(*, on: bool) -> list[InitPluginProtocol]:
    """Plugins of the application. Raises `InvalidField` where it is wanted and not installed."""
    if not on:
        return []
    try:
        from litestar.plugins.opentelemetry import OpenTelemetryConfig, OpenTelemetryPlugin
    except (MissingDependencyException, ImportError) as error:
        raise InvalidField(
            "otel is on and OpenTelemetry is not installed: pip install 'rollout-server[otel]', and start the server "
            "by opentelemetry-instrument.",
            param="otel",
        ) from error
    return [OpenTelemetryPlugin(OpenTelemetryConfig())]
