"""Tiny models on disk and in memory, made once a session; a driver over one is cheap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout_server.engine.messages import EngineOptions
from rollout_server.engine.model import ResidentModel, load
from tests import tiny_models
from tests.engine.driver import Driver


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def path(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.build(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return path


@pytest.fixture(scope="session")
def qwen(model_path: Callable[[str], Path]) -> Path:
    return model_path("qwen3")


@pytest.fixture(scope="session")
def bare_model(model_path: Callable[[str], Path]) -> Callable[[str], ResidentModel]:
    """Models without adapters, to be shared by tests that only use the base."""
    loaded: dict[str, ResidentModel] = {}

    def model(family: str) -> ResidentModel:
        if family not in loaded:
            loaded[family] = load(EngineOptions(str(model_path(family)), family, max_batch=64))
        return loaded[family]

    return model


@pytest.fixture
def base(bare_model: Callable[[str], ResidentModel], qwen: Path) -> Driver:
    """A driver on the shared base; publish nothing on it."""
    return Driver.start(qwen, bare_model("qwen3"), max_batch=64)


@pytest.fixture
def driver(qwen: Path) -> Driver:
    """A driver with a model of its own, for tests that push adapters."""
    return Driver.start(qwen)
