"""Adapters for the tests: files as trainers write them, and the bundles they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from adapters.numerics import squared_delta_norms
from adapters.prepare import HostDelta
from adapters.resident.dora_norms import AdaptedRows, RowNorms, Rows
from adapters.resident.model_layers import holder
from tests.support.tiny_models import random_adapter

Layers = Mapping[str, tuple[int, int]]
Tensors = dict[str, np.ndarray]


def make(
    layers: Layers,
    seed: int = 1,
    rank: int = 4,
    *,
    targets: Sequence[str] | None = None,
    kind: Literal["peft", "mlx"] = "peft",
    scale: float = 2.0,
    dora: bool = False,
) -> AdapterBundle:
    tensors, config = random_adapter(layers, rank, seed, scale, kind, targets=targets, dora=dora)
    return read_bundle(save(tensors), config, layers=layers)


def file_of(tensors: Tensors, config: dict[str, Any] | None = None) -> bytes:
    """Safetensors bytes, with the configuration in the metadata if one is given."""
    return save(tensors, metadata=None if config is None else {"adapter_config": json.dumps(config)})


def merge(model: nn.Module, bundle: AdapterBundle) -> nn.Module:
    """W + scale · B · A, and for DoRA its rows brought to their magnitudes, in every layer, by hand, in float64;
    returns the same model, whose weights must be plain float32."""
    weights = dict(tree_flatten(model.parameters()))
    embedding = next((name for name in weights if "embed" in name), "")
    two = TwoTables(weights.get(embedding, mx.zeros((1, 1))))
    merged = []
    for path, module in bundle.spec.modules.items():
        a, b, *magnitude = (bundle.tensors[f"{path}.{p}"].float32().astype(np.float64) for p in bundle.spec.parts)
        name = f"{path}.weight" if module.place in ("linear", "experts") else embedding
        weight = np.array(weights[name]).astype(np.float64)
        weight = (weight.T if "embedding" in module.place else weight) + module.scale * (b @ a)
        if magnitude:
            weight *= (magnitude[0] / np.linalg.norm(weight, axis=1))[:, None]
        if module.place in ("linear", "experts"):
            merged.append((name, mx.array(weight.astype(np.float32))))
        elif module.place == "tied_head":
            two.head = mx.array(weight.astype(np.float32))
        else:
            two.table = mx.array(np.ascontiguousarray(weight.T).astype(np.float32))
    model.update(tree_unflatten(merged))
    if any(module.place not in ("linear", "experts") for module in bundle.spec.modules.values()):
        parent, name = holder(model, embedding.removesuffix(".weight"))
        parent[name] = two
    return model


def adapted(known: RowNorms, weights: Rows, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """‖W + scale · B · A‖ of each row, in one go."""
    ones, squared = np.ones(len(b), np.float32), squared_delta_norms(a, b, scale)
    pending = known.begin("here", weights, HostDelta(a, b, scale, ones, squared))
    while not pending.dispatched:
        mx.eval(pending.next_piece()[0])
    return AdaptedRows.of([pending]).lengths


class TwoTables(nn.Module):
    """An embedding whose head has a weight of its own."""

    def __init__(self, table: mx.array) -> None:
        super().__init__()
        self.table, self.head = table, table

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.table[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.head.T


def logits(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """float32 [batch, length, vocabulary]"""
    out = model(mx.array(tokens)).astype(mx.float32)
    return np.array(out)


def tokens(batch: int, length: int = 7, seed: int = 0) -> np.ndarray:
    """Different rows, so that a mixed-up row shows."""
    return np.random.default_rng(seed).integers(0, 300, size=(batch, length))
