"""One server for all commands: most of what they do takes less time than its start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.live_server import Server, server_here


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="package")
def adapter(model: Path) -> Path:
    layers = tiny_models.linear_layers(model)
    return tiny_models.save_adapter(model.parent / "adapter", *tiny_models.random_adapter(layers, 4, 1))


@pytest.fixture(scope="package")
def server(model: Path, adapter: Path) -> Iterator[Server]:
    with server_here(model, kv_memory="64MiB", adapter_dir=adapter.parent) as live:
        yield live
