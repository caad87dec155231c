"""One real server of the embedded model for all tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.live_server import server_here


@pytest.fixture(scope="package")
def server() -> Iterator[str]:
    """Its address."""
    with server_here(None) as server:
        yield server.url
