"""What is no adapter of this base, or too large."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from litestar.testing import TestClient

from tests.support.http.fake_engine import LAYERS, FakeEngine

Client = TestClient[Any]
PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_truncated_safetensors(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    for length in (4, 60, len(adapter()) - 1):
        problem(push(weights=adapter()[:length]), 422, "adapter_invalid")


def test_a_pickle_renamed(push: Callable[..., Any], problem: Any) -> None:
    problem(push(weights=pickle.dumps({"lora_A": [1.0]})), 422, "adapter_invalid")


def test_a_header_of_two_gigabytes(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    problem(push(weights=(2 * 2**30).to_bytes(8, "little") + adapter()[8:]), 422, "adapter_invalid")


def test_wrong_shapes_are_all_listed(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    changes = {
        f"{PREFIX}{Q_PROJ}.lora_A.weight": np.zeros((4, 2), np.float32),
        f"{PREFIX}model.layers.0.mlp.down_proj.lora_B.weight": np.zeros((5, 2), np.float32),
    }
    error = problem(push(weights=adapter(**changes)), 422, "adapter_mismatch")
    assert len(error["faults"]) == 2
    assert all(fault in error["message"] for fault in error["faults"])


def test_half_of_the_tensors_missing(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    missing = {f"{PREFIX}{path}.lora_B.weight": None for path in LAYERS}
    error = problem(push(weights=adapter(**missing)), 422, "adapter_mismatch")
    assert len(error["faults"]) == len(LAYERS)


def test_tensors_nobody_asked_for(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    stranger = {f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": np.zeros((2, 4), np.float32)}
    problem(push(weights=adapter(**stranger)), 422, "adapter_mismatch")


def test_nan_in_the_weights(push: Callable[..., Any], adapter: Callable[..., bytes], problem: Any) -> None:
    bad = {f"{PREFIX}{Q_PROJ}.lora_A.weight": np.full((2, 4), np.nan, np.float32)}
    error = problem(push(weights=adapter(**bad)), 422, "adapter_mismatch")
    assert Q_PROJ in error["faults"][0]


def test_no_configuration(push: Callable[..., Any], problem: Any) -> None:
    problem(push(config=None), 422, "adapter_invalid")


def test_an_upload_over_the_limit(
    client: Client, engine: FakeEngine, push: Callable[..., Any], problem: Callable[..., Any]
) -> None:
    error = problem(push(weights=b"x" * 100_001), 413, "body_too_large")
    assert "--max-upload" in error["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 1000

    octets = {"content-type": "application/octet-stream"}
    response = client.post("/v1/weights?name=policy", content=endless(), headers=octets)
    problem(response, 413, "body_too_large")
    assert not engine.published
