"""What a model directory will take on this device, read from the headers of its files before anything is loaded, and
before mlx-lm is: any thread may ask."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from rollout_server.engine.model.checkpoint.files import WEIGHTS, check_model, read_config
from rollout_server.errors import EngineUnavailable
from rollout_server.machine.device_defaults import in_words
from rollout_server.machine.this_device import device_memory
from rollout_server.models.encoders.families import ENCODERS

FLOATS = ("F16", "BF16", "F32")
"""What the CPU computes in float32, whatever the files hold."""
F32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelFootprint:
    weights: int
    """Bytes of the weights as they will be in memory; at most: what the model's class leaves out is counted."""
    encoder: bool


def footprint_of(directory: Path) -> ModelFootprint:
    """Raises `EngineUnavailable` with the file at fault."""
    config = read_config(directory)
    check_model(directory)
    on_cpu = mx.default_device() == mx.cpu
    return ModelFootprint(
        sum(_bytes(path, on_cpu) for path in directory.glob(WEIGHTS)), config.get("model_type") in ENCODERS
    )


def _bytes(path: Path, on_cpu: bool) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        widens = on_cpu and entry["dtype"] in FLOATS
        total += F32_BYTES * math.prod(entry["shape"]) if widens else end - begin
    return total


def memory_of_device() -> int:
    """Bytes that this process may have on the device."""
    return device_memory()


def check_room(directory: Path, parts: int = 1) -> None:
    """Raises `EngineUnavailable` where the weights alone, cut into so many parts, are more than the device has: without
    this, a system ends the process while it loads them, and says nothing."""
    weights, memory = footprint_of(directory).weights, device_memory()
    if weights // parts > memory:
        each = "" if parts == 1 else f", {in_words(weights // parts)} of them on each of {parts} ranks"
        more = "a part on each of several devices" if parts == 1 else "parts on more of them"
        raise EngineUnavailable(
            f"The weights of {directory} take {in_words(weights)} in memory{each}, and this device has "
            f"{in_words(memory)}: serve a smaller model, a copy with fewer bits, which `mlx_lm.convert -q` writes, or "
            f"{more} with --tensor-parallel."
        )


def check_share(model_id: str, memory: int | None, weights: int, versions: int | None, kv: int) -> None:
    """Raises `EngineUnavailable` where a model came out larger than its files said, so that what all models were given
    together would not hold. Sizes are in bytes; no `memory` means that nobody counts."""
    together = weights + (versions or 0) + kv
    if memory is not None and together > memory:
        raise EngineUnavailable(
            f"The weights of {model_id} take {in_words(weights)} in memory, more than its files hold: with versions, "
            f"keys and values that is {in_words(together)}, and its share of --memory is {in_words(memory)}. Give more."
        )
