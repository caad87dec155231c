"""A device that computes wrongly, or no longer at all, is noticed and named: at load, and after a step that failed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from adapters.resident.device_check import check_adapters
from adapters.resident.layers import slot_stack
from adapters.resident.model_layers import adaptable_layers
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.device import device_fault, rows_turned
from rollout_server.engine.model.load import load, read_model
from rollout_server.engine.model.resident import ResidentModel
from rollout_server.engine.sampling import sampler, sampler_check
from rollout_server.engine.sampling.sampler_check import check_sampler
from rollout_server.errors import AdapterMismatch, EngineUnavailable
from tests.support.engine.door import FIRE, broken_steps
from tests.support.engine.driver import Driver, prompts_of

GONE = "cudaErrorMisalignedAddress"


def test_a_device_that_is_gone_ends_the_engine(base: Driver, qwen: Path) -> None:
    """Rows of a rebuilt batch would only fail again, one batch after the other."""
    driver = Driver.start(qwen, base.model, device=lambda: GONE)
    driver.submit(prompts_of([5], 286))
    with (
        broken_steps(driver.batch(0)),
        pytest.raises(EngineUnavailable, match=f"no longer computes .{GONE}.") as caught,
    ):
        driver.turn(3)
    driver.engine.die(caught.value)
    assert driver.status.state == "dead" and GONE in (driver.status.fault or "")
    assert GONE in str(driver.error("r1"))


def test_a_step_that_failed_on_a_device_that_is_there_costs_its_rows_alone(base: Driver) -> None:
    id = base.submit(prompts_of([5], 286))
    with broken_steps(base.batch(0)):
        base.finish(id)
    assert FIRE in str(base.error(id)) and device_fault() is None
    assert base.generate(prompts_of([5], 286))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_this_device_computes_adapters_on_every_kind_of_layer(
    family: str, bare_model: Callable[[str], ResidentModel]
) -> None:
    assert bare_model(family).info.unfit == {}


def neighbours(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A gathered product that reads the matrix behind the one it was told to."""

    def wrong(x: mx.array, matrices: mx.array, *, rhs_indices: mx.array, **options: bool) -> mx.array:
        return product(x, matrices, rhs_indices=(rhs_indices + 1) % matrices.shape[0], **options)

    return wrong


def test_products_that_read_another_matrix_are_found(monkeypatch: pytest.MonkeyPatch, qwen: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 5))
    layers = adaptable_layers(module)
    assert check_adapters(module, layers, mx.float32) == {}
    monkeypatch.setattr(slot_stack.mx, "gather_mm", neighbours(mx.gather_mm))
    found = check_adapters(module, layers, mx.float32)
    assert set(found) == {"linear"} and "layers.0 (5 × 6, float32): the output for rows of several" in found["linear"]
    model = load(EngineOptions(str(qwen), "tiny"))
    assert set(model.info.unfit) == {"linear", "tied_embedding", "tied_head"}


def test_what_this_device_computes_wrongly_is_refused_by_name(qwen: Path, base: Driver) -> None:
    why = "in model.layers.0.mlp.up_proj (96 × 64, bfloat16): the output is 0.9 of its size away"
    model = load(EngineOptions(str(qwen), "tiny"))
    driver = Driver.start(qwen, replace(model, info=replace(model.info, unfit={"linear": why})))
    (before,) = driver.generate(prompts_of([9], 286), seed=1)
    with pytest.raises(AdapterMismatch, match="Adapters on linear layers are not served here") as caught:
        driver.push("p", driver.bundle(1))
    assert why in str(caught.value) and "mode=merged" in str(caught.value) and driver.status.policies == ()
    assert driver.push("p", driver.bundle(1), mode="merged").version.number == 1
    assert driver.generate(prompts_of([9], 286), seed=1)[0].token_ids == before.token_ids


@pytest.mark.parametrize("vocabulary", [320, 5003])
def test_a_sampler_that_is_off_is_found(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_sampler(vocabulary, mx.float32, 12) is None
    draw = sampler.sample
    shifted = lambda logits, *rest: draw(mx.roll(logits, 1, axis=0), *rest)  # noqa: E731  the row above
    monkeypatch.setattr(sampler_check, "sample", shifted)
    assert "numpy" in (check_sampler(vocabulary, mx.float32, 12) or "")
    others = lambda logits, arrays, uniform: draw(logits, arrays, 1 - 2**-23 - uniform)  # noqa: E731
    monkeypatch.setattr(sampler_check, "sample", others)
    assert "drew another token" in (check_sampler(vocabulary, mx.float32, 12) or "")


def test_a_server_is_not_started_on_a_device_that_samples_wrongly(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sampler.sample
    monkeypatch.setattr(sampler_check, "sample", lambda logits, *rest: draw(-logits, *rest))
    with pytest.raises(EngineUnavailable, match="does not compute what the sampler asks of it: row 0"):
        load(EngineOptions(str(qwen), "tiny"))


@pytest.mark.skipif(mx.default_device() == mx.cpu, reason="needs a GPU whose faults end the process's context")
def test_an_access_that_the_device_does_not_survive_ends_the_engine(qwen: Path) -> None:
    """In a process of its own, which is lost by it."""
    command = [sys.executable, "-m", "tests.support.engine.losing_device", str(qwen)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "dead: The engine stopped: EngineUnavailable: The device no longer computes" in done.stdout, done


def test_rows_that_the_device_does_not_turn_at_once_are_halved(qwen: Path) -> None:
    """As on CUDA, where few numbers of a head are turned."""
    asked: list[tuple[int, ...]] = []

    def turn(x: mx.array, dims: int, **options: Any) -> mx.array:
        asked.append(x.shape)
        if x.shape[0] > 100:
            raise RuntimeError("cudaGraphAddKernelNode failed: invalid argument")
        return mx.fast.rope(x, dims, **options)

    module = read_model(qwen).module
    assert rows_turned(module, 4, 1024, turn) == 64
    assert [shape[:2] for shape in asked] == [(rows, 4) for rows in (1024, 512, 256, 128, 64)]
    assert rows_turned(module, 4, 1024) == 1024 or mx.default_device() != mx.cpu
