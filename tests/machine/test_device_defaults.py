"""What a server is started with where nobody says it, over a table of machines and models."""

from __future__ import annotations

from itertools import pairwise

import pytest

from rollout_server.engine.kv_cache.sizes import ROW_BUCKETS
from rollout_server.machine.device_defaults import CHUNKS, USUAL_SHAPES, Device, DeviceDefaults, Footprint, choose

GIB = 2**30
H200 = Device(139 * GIB, 4.2e12, cpu=False)
SERVER_80 = Device(79 * GIB, 1.8e12, cpu=False)
DESKTOP_24 = Device(24 * GIB, 0.95e12, cpu=False)
LAPTOP_8 = Device(8 * GIB, 0.25e12, cpu=False)
MAC_16 = Device(int(10.7 * GIB), 6e10, cpu=False)
MAC_128 = Device(96 * GIB, 5e11, cpu=False)
CPU = Device(24 * GIB, 0.0, cpu=True)
DEVICES = (H200, SERVER_80, DESKTOP_24, LAPTOP_8, MAC_16, MAC_128, CPU)


def chosen(device: Device, shape: str) -> DeviceDefaults:
    return choose(device, USUAL_SHAPES[shape].footprint(device))


@pytest.mark.parametrize(
    ("device", "shape", "rows", "chunk"),
    [
        (H200, "Qwen3-0.6B", 1024, 8192),
        (H200, "Qwen3-4B", 768, 4096),
        (H200, "Llama-3.1-8B", 768, 4096),
        (SERVER_80, "Qwen3-0.6B", 512, 8192),
        (DESKTOP_24, "Qwen3-0.6B", 128, 8192),
        (DESKTOP_24, "Llama-3.1-8B", 32, 2048),
        (LAPTOP_8, "Qwen3-0.6B", 48, 4096),
        (MAC_16, "Qwen3-0.6B", 64, 2048),
        (MAC_128, "Qwen3-0.6B", 384, 4096),
        (MAC_128, "Llama-3.1-8B", 512, 2048),
        (CPU, "Qwen3-0.6B", 64, 512),
        (CPU, "Qwen3-4B", 64, 512),
    ],
)
def test_what_is_chosen_for_a_machine(device: Device, shape: str, rows: int, chunk: int) -> None:
    found = chosen(device, shape)
    assert (found.max_batch.value, found.prefill_tokens.value) == (rows, chunk)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", USUAL_SHAPES)
def test_all_that_is_chosen_fits_together(device: Device, shape: str) -> None:
    model = USUAL_SHAPES[shape].footprint(device)
    if model.weights + model.adapters > device.memory * 3 // 4:
        return
    found = choose(device, model)
    logits = found.max_batch.value * model.logits_row
    activations = found.prefill_tokens.value * model.activations_token
    assert model.weights + model.adapters + found.kv_memory.value + logits + activations <= device.memory


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_leaves_nothing_is_served_a_few_rows_at_a_time(device: Device) -> None:
    model = Footprint(device.memory, 1 << 20, 1 << 20, 1 << 20, adapters=device.memory)
    found = choose(device, model)
    assert found.max_batch.value >= 8 and found.prefill_tokens.value >= 512
    assert 0 < found.kv_memory.value <= device.memory // 32


def test_more_memory_or_speed_never_chooses_less() -> None:
    for shape in USUAL_SHAPES.values():
        for smaller, larger in (
            *pairwise(Device(size * GIB, 1e12, cpu=False) for size in (20, 24, 40, 80, 140, 280)),
            *pairwise(Device(80 * GIB, speed, cpu=False) for speed in (5e10, 2e11, 1e12, 4e12, 8e12)),
        ):
            less, more = (choose(device, shape.footprint(device)) for device in (smaller, larger))
            assert less.prefill_tokens.value <= more.prefill_tokens.value
            assert less.max_batch.value <= more.max_batch.value or less.kv_memory.value > more.kv_memory.value


def test_rows_and_chunks_are_sizes_that_occur() -> None:
    for device in DEVICES:
        for shape in USUAL_SHAPES:
            found = chosen(device, shape)
            assert found.max_batch.value in ROW_BUCKETS and found.prefill_tokens.value in CHUNKS


def test_what_is_given_stays_and_the_rest_goes_with_it() -> None:
    model = USUAL_SHAPES["Qwen3-0.6B"].footprint(H200)
    found = choose(H200, model, kv_memory=GIB)
    assert found.kv_memory.value == GIB and found.max_batch.value == 16
    assert [sentence.split()[0] for sentence in found.sentences()] == ["--max-batch", "--prefill-tokens"]
    given = choose(H200, model, max_batch=3, prefill_tokens=77, kv_memory=5)
    assert (given.max_batch.value, given.prefill_tokens.value, given.kv_memory.value) == (3, 77, 5)
    assert not list(given.sentences())


def test_state_of_fixed_size_and_wide_logits_count() -> None:
    model = Footprint(GIB, 1024, 1024, 1024, adapters=0)
    free = choose(DESKTOP_24, model).max_batch.value
    recurrent = Footprint(GIB, 1024, 1024, 1024, adapters=0, kv_row=GIB // 2)
    assert choose(DESKTOP_24, recurrent).max_batch.value < free
    wide = Footprint(GIB, 1024, 1024, 64 << 20, adapters=0)
    found = choose(DESKTOP_24, wide).max_batch
    assert found.value * (64 << 20) <= DESKTOP_24.memory // 16 and "64.0 MiB a row" in found.reason


def test_every_choice_says_why_in_a_sentence() -> None:
    for device in DEVICES:
        for shape in USUAL_SHAPES:
            sentences = list(chosen(device, shape).sentences())
            assert len(sentences) == 3
            assert all(sentence.startswith("--") and sentence.endswith(".") for sentence in sentences)
