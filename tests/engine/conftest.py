"""Tiny models on disk and in memory, made once a session; a driver over one is cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.resident.layers.expert_product import ExpertLinear, PackedExpertLinear
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.resident import ResidentModel
from tests.support import tiny_models
from tests.support.engine.driver import Driver
from tests.support.engine.loaded_models import loaded

AS_ON_A_CPU: dict[str, Any] = {"max_batch": 64, "prefill_tokens": 512}
"""What a GPU would choose for itself: tests count turns."""


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
def bare_models() -> dict[str, ResidentModel]:
    """Those that were loaded, by family."""
    return {}


@pytest.fixture(scope="session")
def bare_model(
    model_path: Callable[[str], Path], bare_models: dict[str, ResidentModel]
) -> Callable[[str], ResidentModel]:
    """Models without adapters, to be shared by tests that only use the base."""

    def model(family: str) -> ResidentModel:
        if family not in bare_models:
            bare_models[family] = loaded(EngineOptions(str(model_path(family)), family, max_batch=64))
        return bare_models[family]

    return model


@pytest.fixture(autouse=True)
def shared_models_stay_bare(bare_models: dict[str, ResidentModel]) -> Iterator[None]:
    """What one test mounts on a shared model, the base of every test after it would compute with."""
    yield
    for family, model in list(bare_models.items()):
        adapted = [module for module in model.module.modules() if type(module).__module__.startswith("adapters.")]
        if any(type(module) not in (ExpertLinear, PackedExpertLinear) for module in adapted):
            del bare_models[family]
            raise AssertionError(f"this test pushed to the {family} that others share: give it a model of its own")


@pytest.fixture
def base(bare_model: Callable[[str], ResidentModel], qwen: Path) -> Driver:
    """A driver on the shared base; publish nothing on it."""
    return Driver.start(qwen, bare_model("qwen3"), **AS_ON_A_CPU)


@pytest.fixture
def driver(qwen: Path) -> Driver:
    """A driver with a model of its own, for tests that push adapters."""
    return Driver.start(qwen, **AS_ON_A_CPU)
