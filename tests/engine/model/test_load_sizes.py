"""A loaded model has the sizes that were asked for, and for the rest those that go with the device and the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model import load_sizes
from rollout_server.engine.model.kv_choice import ChosenStore
from rollout_server.engine.model.load import load
from rollout_server.machine.device_defaults import Device

GPU = Device(80 * 2**30, 1.8e12, cpu=False)


def test_a_cpu_decodes_64_rows_and_reads_512_tokens(qwen: Path, caplog: pytest.LogCaptureFixture) -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("there is a GPU")
    with caplog.at_level("INFO"):
        info = load(EngineOptions(str(qwen), "tiny")).info
    assert (info.max_batch, info.prefill_tokens) == (64, 512)
    for option in ("--max-batch is 64: ", "--prefill-tokens is 512: ", "--kv-memory is "):
        assert option in caplog.text


def test_what_is_asked_for_is_not_chosen(qwen: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = EngineOptions(str(qwen), "tiny", max_batch=3, prefill_tokens=70, kv_memory=2**20)
    with caplog.at_level("INFO"):
        info = load(options).info
    assert (info.max_batch, info.prefill_tokens, info.kv_memory) == (3, 70, 2**20)
    assert " is 3:" not in caplog.text


def test_a_gpu_gets_what_it_holds(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_sizes, "this_device", lambda: GPU)
    info = load(EngineOptions(str(qwen), "tiny")).info
    assert info.max_batch > 64 and info.prefill_tokens == 8192
    assert info.kv_memory > GPU.memory // 3
    little = load(EngineOptions(str(qwen), "tiny", kv_memory=info.kv_bytes_per_token * 512 * 20)).info
    assert little.max_batch == 16, "twenty rows of 512 tokens fit"


def test_rows_that_cannot_share_a_batch_are_one(model_path: Callable[[str], Path]) -> None:
    info = load(EngineOptions(str(model_path("gemma2")), "tiny", max_batch=8)).info
    assert info.cache == "serial" and info.max_batch == 1


def test_no_more_rows_than_the_device_takes_in_a_step(caplog: pytest.LogCaptureFixture) -> None:
    store = ChosenStore("slots", 1024, 0, lambda rows: None, fits=lambda rows: min(rows, 16))  # type: ignore[arg-type, return-value]
    sizes = load_sizes.chosen_sizes(
        EngineOptions("nowhere", "tiny", max_batch=64), store, {"layer": (8, 8)}, 320, mx.float32, 4096
    )
    assert sizes.max_batch.value == 16 and "--max-batch is 16: MLX cannot turn more rows" in caplog.text
