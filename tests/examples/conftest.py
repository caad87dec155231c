"""One server of the embedded model for all examples that need no environment of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.live_server import Server, server_here


@pytest.fixture(scope="package")
def live() -> Iterator[Server]:
    with server_here(None) as server:
        yield server
