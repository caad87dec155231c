"""Adapters of the benchmark model as bytes on the wire, each push another content, at next to no cost to the client."""

from __future__ import annotations

import http.client
import json
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from safetensors.numpy import save

from tests.support.tiny_models import linear_layers, random_adapter

RANK = 16
PADDED_MB = 20


@dataclass
class Body:
    """A safetensors file of which one value is changed before each push, so that none is a repetition."""

    name: str
    weights: bytearray
    place: int
    """Offset of a float32 that may have any value."""
    count: int = 0

    @property
    def megabytes(self) -> float:
        return len(self.weights) / 1e6

    def fresh(self) -> bytearray:
        self.count += 1
        self.weights[self.place : self.place + 4] = struct.pack("<f", 1.0 + self.count / 65536)
        return self.weights


def bodies(model: Path) -> dict[str, Body]:
    """Rank 16 float32 on every linear layer, as LoRA and as DoRA, and both padded with zero ranks to 20 MB."""
    layers = linear_layers(model)
    made = {}
    for kind, dora in (("LoRA", False), ("DoRA", True)):
        tensors, config = random_adapter(layers, RANK, 1, dora=dora)
        plain = _body(kind, tensors, config)
        rank = round(RANK * PADDED_MB / plain.megabytes)
        padded = {name: _padded(name, tensor, rank) for name, tensor in tensors.items()}
        scaled = config | {"r": rank, "lora_alpha": config["lora_alpha"] * rank / RANK}
        made |= {kind: plain, f"{kind}, padded": _body(f"{kind}, padded", padded, scaled)}
    return made


def _padded(name: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    if "lora_A" in name:
        return np.pad(tensor, ((0, rank - RANK), (0, 0)))
    return np.pad(tensor, ((0, 0), (0, rank - RANK))) if "lora_B" in name else tensor


def _body(name: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Body:
    weights = bytearray(save(tensors, metadata={"adapter_config": json.dumps(config)}))
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    first = next(entry for path, entry in header.items() if "lora_A" in path)
    return Body(name, weights, 8 + length + first["data_offsets"][0])


@dataclass
class Pusher:
    """One kept connection. `receive`, `timings` and `seconds` hold what was measured since they were cleared."""

    url: str
    replies: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=120)

    def push(self, body: Body, name: str) -> dict[str, Any]:
        """The timings of the reply, milliseconds."""
        reply = self._send(f"/v1/weights?name={quote(name)}", body, 201)
        return dict(reply["timings_ms"])

    def discard(self, body: Body) -> dict[str, Any]:
        """The same bytes to the bare route."""
        return self._send("/bare", body, 200)

    def _send(self, path: str, body: Body, status: int) -> dict[str, Any]:
        content = body.fresh()
        began = time.perf_counter()
        self._connection.request("POST", path, content, {"content-type": "application/octet-stream"})
        reply = self._connection.getresponse()
        text = reply.read()
        self.seconds.append(time.perf_counter() - began)
        if reply.status != status:
            raise RuntimeError(f"{path} was answered with {reply.status}: {text[:500]!r}")
        answer: dict[str, Any] = json.loads(text)
        return answer
