"""What a directory will take, against what it takes once it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.encoders.resident import load_encoder
from rollout_server.engine.model.footprints import check_room, check_share, footprint_of, memory_of_device
from rollout_server.engine.model.load import load, read_model
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable
from tests.support import tiny_models, tiny_scorers
from tests.support.golden_encoders import copied


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_decoder(family: str, tmp_path: Path) -> None:
    directory = tiny_models.build(family, tmp_path / family)
    found, loaded = footprint_of(directory), load(EngineOptions(str(directory), "tiny")).info.weight_bytes
    assert not found.encoder and loaded <= found.weights <= 1.01 * loaded


def test_on_a_cpu_what_is_half_as_wide_counts_twice(tmp_path: Path) -> None:
    directory = tiny_scorers.build("llama", tmp_path / "rm")
    whole = footprint_of(directory).weights
    path = str(directory / "model.safetensors")
    tensors = {name: mx.array(array.astype(np.float32)) for name, array in load_file(path).items()}
    mx.save_safetensors(path, {name: array.astype(mx.bfloat16) for name, array in tensors.items()})
    found = footprint_of(directory).weights
    assert found == (whole if mx.default_device() == mx.cpu else whole // 2)
    loaded = load(EngineOptions(str(directory), "rm")).info.weight_bytes
    assert loaded <= found <= 1.01 * loaded, "the head stands apart"


def test_an_encoder(tmp_path: Path) -> None:
    directory = copied("bert/classify", tmp_path / "bert")
    found = footprint_of(directory)
    assert found.encoder and found.weights >= load_encoder(EngineOptions(str(directory), "bert")).info.weight_bytes


def test_a_model_that_outgrows_its_share_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.build("llama", tmp_path / "llama")
    small = EngineOptions(str(directory), "tiny", memory=10_000, weights_memory=1000, kv_memory=1000)
    with pytest.raises(EngineUnavailable, match=r"tiny take .* KiB in memory, more than its files hold"):
        load(small)
    check_share("tiny", None, 10**12, None, 10**12)
    assert memory_of_device() > 2**28


def hollow(directory: Path, size: int) -> Path:
    """A tiny model whose file of weights is about as long as `size` says, and holds nothing."""
    model, side = tiny_models.build("qwen3", directory), 1 << 20
    size = (size // (4 * side) + 1) * 4 * side
    header = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [size // (4 * side), side], "data_offsets": [0, size]}
    }
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return model


def test_a_model_too_large_for_one_device_may_be_cut_over_several(tmp_path: Path) -> None:
    half_as_large_again = hollow(tmp_path / "model", memory_of_device() * 3 // 2)
    with pytest.raises(EngineUnavailable, match="a part on each of several devices with --tensor-parallel"):
        check_room(half_as_large_again)
    check_room(half_as_large_again, parts=2)
    thrice = hollow(tmp_path / "larger", memory_of_device() * 3)
    two: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    with pytest.raises(EngineUnavailable, match=r"on each of 2 ranks, .*, or parts on more of them with --tensor-par"):
        read_model(thrice, Ranks(two))
