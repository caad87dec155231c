"""One server of the embedded model for all, and OpenAI's own clients for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

import rollout_server.demo
from tests.support import tiny_models
from tests.support.live_server import Server, server_here
from trainer_client import RolloutClient

DEMO = Path(rollout_server.demo.__file__).parent / "model"
KEY, ADMIN = "inference-key", "admin-key"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="package")
def live() -> Iterator[Server]:
    """With `policy` at version 2."""
    with server_here(None, max_batch=128, served_model_name="org/demo") as server:
        with RolloutClient(server.url) as trainer:
            for seed in (1, 2):
                tensors, config = tiny_models.random_adapter(tiny_models.linear_layers(DEMO), 4, seed)
                trainer.push("policy", {name: np.asarray(value) for name, value in tensors.items()}, config)
        yield server


@pytest.fixture(scope="package")
def guarded() -> Iterator[Server]:
    """With keys, and room for one request."""
    with server_here(None, max_queue=1, api_key=KEY, admin_key=ADMIN) as server:
        yield server


@pytest.fixture(scope="package")
def client(live: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client
