"""Applications whose routes were registered once: that is nearly all that an application costs."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

from litestar import Litestar

from rollout_server.config import ServerConfig
from rollout_server.http import app as app_module
from rollout_server.http.app import create_app
from tests.support.http.fake_engine import FakeEngine


@cache
def routed() -> Litestar:
    """The application whose routes the others have; it is never started."""
    return create_app(ServerConfig(), FakeEngine(None))  # type: ignore[arg-type]


def make_app(config: ServerConfig, engine: Any = None) -> Litestar:
    """`create_app`, with routes of one application of this process where the configuration does not choose them. Its
    state, its life and what it answers with are its own."""
    if config.page != ServerConfig.model_fields["page"].default or config.otel == "on":
        return create_app(config, engine)
    with patch.multiple(app_module, routes_of=lambda config: (), document=lambda config: None):
        app = create_app(config, engine)
    app.routes, app.asgi_handler, app.plugins = routed().routes, routed().asgi_handler, routed().plugins
    return app
