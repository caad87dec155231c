"""What the tests of a Ray cluster share: the cluster, an event loop, and a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.fleet.ray_nodes import RayNodes, Running


@pytest.fixture(scope="session")
def nodes() -> Iterator[RayNodes]:
    """Three nodes, of which two have a place for a replica."""
    found = RayNodes(2)
    yield found
    found.close()


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    loop = Running()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny")
