"""What a server is started with where nobody says it: how many rows decode together, how many tokens a turn reads, and
the memory of keys and values. Plain arithmetic on what the device was found to be and what the model takes on it.

A step reads the weights and what is kept of its rows, and a forward of a chunk computes with the weights: what either
costs beside that, the launches of a model's operations, is the same for one row and for hundreds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rollout_server.engine.kv_cache.sizes import ROW_BUCKETS

CPU_ROWS, CPU_CHUNK = 64, 512
LEAST_ROWS = 8
CHUNKS = (512, 1024, 2048, 4096, 8192)
ROW_TOKENS = 512
"""Tokens of a usual row, prompt and reply together. Longer ones find their room in the ledger, or wait."""
LAUNCHES_S = 0.005
"""What a forward of a GPU costs whatever it reads: the host's part of some hundreds of operations."""
OPERATIONS_A_BYTE = 100
"""Operations that a GPU performs while it reads one byte: 30 on a laptop, 200 on a server."""
CHUNK_SHARE = 20
"""A chunk is long enough to compute for this many times its forward's fixed cost."""
ROWS_SHARE = 8
"""Rows are added until reading keys and values takes this many times as long as all else of a step."""
KV_SHARE, CPU_KV_SHARE = 2, 4
"""One part in so many of what weights and versions leave: most users train on the same device, and a CPU's memory is
the whole machine's."""
HEADROOM = 16
"""One part in so many of the memory may be the logits of a step, and another the activations of a chunk."""
LOGITS = 6 * 4
"""Bytes that sampling takes for one row and one entry of the vocabulary."""
ACTIVATIONS = 16
"""Arrays as wide as the widest layer that a forward holds at once for each token."""
ADAPTERS = 16
"""One part in so many of the weights is room for versions, where nobody has counted it."""


@dataclass(frozen=True, slots=True)
class Device:
    """What was found out about the device. `memory` is bytes that may be used, `bandwidth` bytes a second, on which
    no choice for a CPU depends."""

    memory: int
    bandwidth: float
    cpu: bool


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes, in bytes."""

    weights: int
    kv_token: int
    """Keys and values of one token."""
    activations_token: int
    """What a forward holds for each token that it reads."""
    logits_row: int
    """What sampling takes for each row."""
    adapters: int
    """Room for versions."""
    kv_row: int = 0
    """State of a row whatever its length."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder without quantisation, of which `kv_width` numbers a layer and token are keys, and as many values."""

    parameters: int
    layers: int
    kv_width: int
    widest: int
    vocabulary: int

    def footprint(self, device: Device) -> Footprint:
        """In float32 on a CPU and in bfloat16 elsewhere, as models are served."""
        value = 4 if device.cpu else 2
        return Footprint(
            weights=self.parameters * value,
            kv_token=2 * self.layers * self.kv_width * value,
            activations_token=ACTIVATIONS * self.widest * value,
            logits_row=LOGITS * self.vocabulary,
            adapters=self.parameters * value // ADAPTERS,
        )


USUAL_SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "Qwen3-0.6B": Shape(596_000_000, 28, 1024, 3072, 151_936),
        "Qwen3-4B": Shape(4_022_000_000, 36, 1024, 9728, 151_936),
        "Llama-3.1-8B": Shape(8_030_000_000, 32, 1024, 14_336, 128_256),
    }
)
"""Examples for who asks before there is a model."""


@dataclass(frozen=True, slots=True)
class Choice:
    value: int
    reason: str
    """A sentence."""
    given: bool = False


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    max_batch: Choice
    prefill_tokens: Choice
    kv_memory: Choice
    """In bytes."""

    def sentences(self) -> Iterator[str]:
        """What was chosen and why, an option each; what was given is not chosen."""
        for option, choice, shown in (
            ("--max-batch", self.max_batch, str(self.max_batch.value)),
            ("--prefill-tokens", self.prefill_tokens, str(self.prefill_tokens.value)),
            ("--kv-memory", self.kv_memory, in_words(self.kv_memory.value)),
        ):
            if not choice.given:
                yield f"{option} is {shown}: {choice.reason}"


def choose(
    device: Device,
    model: Footprint,
    *,
    max_batch: int | None = None,
    prefill_tokens: int | None = None,
    kv_memory: int | None = None,
) -> DeviceDefaults:
    """What is given stays; the rest is chosen to go with it."""
    chunk = _chunk(device, model) if prefill_tokens is None else _given(prefill_tokens)
    memory = _kv_memory(device, model, chunk.value) if kv_memory is None else _given(kv_memory)
    rows = _rows(device, model, memory.value) if max_batch is None else _given(max_batch)
    return DeviceDefaults(rows, chunk, memory)


def _given(value: int) -> Choice:
    return Choice(value, "it was given.", given=True)


def _chunk(device: Device, model: Footprint) -> Choice:
    if device.cpu:
        return Choice(CPU_CHUNK, "a CPU reads no faster in larger ones.")
    fixed = model.weights + LAUNCHES_S * device.bandwidth
    by_speed = int(CHUNK_SHARE * OPERATIONS_A_BYTE * fixed / max(model.weights, 1))
    by_memory = device.memory // HEADROOM // max(model.activations_token, 1)
    tokens = max([size for size in CHUNKS if size <= min(by_speed, by_memory)], default=CHUNKS[0])
    if by_memory < by_speed and tokens < CHUNKS[-1]:
        return Choice(tokens, f"each token read takes {in_words(model.activations_token)} of activations.")
    percent = 100 * by_speed / CHUNK_SHARE / tokens
    return Choice(
        tokens, f"at {_speed(device)} a forward costs some {percent:.0f} % of what it then computes, whatever it reads."
    )


def _kv_memory(device: Device, model: Footprint, chunk: int) -> Choice:
    taken = model.weights + model.adapters + chunk * model.activations_token + device.memory // HEADROOM
    # A model that hardly fits is served all the same, a few rows at a time.
    room = max(device.memory - taken, device.memory // HEADROOM)
    share = CPU_KV_SHARE if device.cpu else KV_SHARE
    part = {2: "half", 4: "a quarter"}[share]
    return Choice(
        room // share,
        f"{part} of what weights ({in_words(model.weights)}), versions ({in_words(model.adapters)}), logits and a "
        f"chunk of {chunk} tokens leave of {in_words(device.memory)}.",
    )


def _rows(device: Device, model: Footprint, kv_memory: int) -> Choice:
    if device.cpu:
        return Choice(CPU_ROWS, "on a CPU more rows cost as much more time.")
    row = ROW_TOKENS * model.kv_token + model.kv_row
    fixed = model.weights + LAUNCHES_S * device.bandwidth
    limits = (
        (
            kv_memory // max(row, 1),
            f"{in_words(kv_memory)} of keys and values hold so many rows of {ROW_TOKENS} tokens.",
        ),
        (device.memory // HEADROOM // max(model.logits_row, 1), f"sampling takes {in_words(model.logits_row)} a row."),
        (
            int(ROWS_SHARE * fixed / max(row, 1)),
            f"at {_speed(device)} a step of more would be spent on keys and values alone.",
        ),
        (ROW_BUCKETS[-1], "no device was seen to gain by more."),
    )
    most, reason = min(limits)
    return Choice(
        max([rows for rows in ROW_BUCKETS if rows <= most and rows >= LEAST_ROWS], default=LEAST_ROWS), reason
    )


def _speed(device: Device) -> str:
    return f"{device.bandwidth / 1e9:,.0f} GB/s"


def in_words(size: int) -> str:
    """Bytes as a person writes them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"
