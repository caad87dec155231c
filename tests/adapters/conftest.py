"""Tiny random models and adapters for them; one build of each model per session, a fresh instance per test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model

from adapters.resident.model_layers import adaptable_layers
from tests.support import tiny_models

Layers = dict[str, tuple[int, int]]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 with grouped heads, no square layer, and a head of its own."""
    where = tmp_path_factory.mktemp("models") / "qwen3"
    return tiny_models.build("qwen3", where, num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture
def load(directory: Path) -> Callable[[], nn.Module]:
    """A new instance of the model each time."""
    return lambda: load_model(directory)[0]


@pytest.fixture
def model(load: Callable[[], nn.Module]) -> nn.Module:
    return load()


@pytest.fixture(scope="session")
def layers(directory: Path) -> Layers:
    return adaptable_layers(load_model(directory)[0])
