"""What a reader has: the server of the quick start with its two versions, and a folder with adapters and models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rollout_server.demo.run import model_directory
from tests.docs.pages import ROOT
from tests.support import tiny_scorers
from tests.support.live_server import server_here
from tests.support.tiny_models import linear_layers, random_adapter, save_adapter
from trainer_client import RolloutClient

RECURRENT = ROOT / "tests" / "golden" / "recurrent" / "plain" / "state.safetensors"


@pytest.fixture(scope="session")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `docs/guide/README.md` describes."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(model_directory(), folder / "model")
    layers = linear_layers(folder / "model")
    width = layers["model.layers.0.self_attn.q_proj"][1]
    save_adapter(folder / "adapter", *random_adapter(layers, 4, seed=1))
    for name, task, seed in (("reward-adapter", "SEQ_CLS", 2), ("step-adapter", "TOKEN_CLS", 3)):
        tensors, config = random_adapter(layers, 4, seed=seed)
        head = np.random.default_rng(seed).normal(size=(1, width)).astype(np.float32)
        tensors["base_model.model.score.weight"] = head
        save_adapter(folder / name, tensors, config | {"task_type": task, "modules_to_save": ["classifier", "score"]})
    tiny_scorers.build("llama", folder / "reward-model")
    (folder / "text.txt").write_text("\n".join(f"{a}+{b}={a + b}" for a in range(9) for b in range(9)))
    (folder / "state.safetensors").write_bytes(RECURRENT.read_bytes())
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="session")
def url(belongings: Path) -> Iterator[str]:
    """Where the quick start has left its server: `policy@1` and `policy@2` are there."""
    with server_here(None) as server, RolloutClient(server.url) as client:
        for source in ((belongings / "adapter",), random_adapter(linear_layers(belongings / "model"), 4, seed=5)):
            client.pin("policy", client.push("policy", *source).version)  # whatever pages push in between
        yield server.url


@pytest.fixture
def folder(belongings: Path, tmp_path: Path) -> Path:
    """The reader's folder, for one page."""
    return Path(shutil.copytree(belongings, tmp_path / "reader", symlinks=True))
