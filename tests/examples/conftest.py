"""One server of the embedded model for all examples that need no environment of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.live_server import LiveServer, live_server


@pytest.fixture(scope="session")
def live() -> Iterator[LiveServer]:
    with live_server(None) as server:
        yield server
