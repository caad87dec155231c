"""One real server of the embedded model for all tests of the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout_server.demo.run import serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    log: Path = tmp_path_factory.mktemp("server") / "server.log"
    with serving(log) as url:
        yield url
