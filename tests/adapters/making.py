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

from adapters.bundle import AdapterBundle, read_bundle
from tests.tiny_models import random_adapter

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
) -> AdapterBundle:
    tensors, config = random_adapter(layers, rank, seed, scale, kind, targets=targets)
    return read_bundle(save(tensors), config, layers=layers)


def file_of(tensors: Tensors, config: dict[str, Any] | None = None) -> bytes:
    """Safetensors bytes, with the configuration in the metadata if one is given."""
    return save(tensors, metadata=None if config is None else {"adapter_config": json.dumps(config)})


def merge(model: nn.Module, bundle: AdapterBundle) -> nn.Module:
    """W + scale · B · A in every layer, by hand, in float32; returns the same model."""
    weights = dict(tree_flatten(model.parameters()))
    merged = []
    for path, module in bundle.spec.modules.items():
        a, b = (bundle.tensors[f"{path}.{half}"].float32().astype(np.float64) for half in ("lora_A", "lora_B"))
        name = f"{path}.weight"
        delta = (module.scale * (b @ a)).astype(np.float32)
        merged.append((name, weights[name] + mx.array(delta)))
    model.update(tree_unflatten(merged))
    return model


def logits(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    """float32 [batch, length, vocabulary]"""
    out = model(mx.array(tokens)).astype(mx.float32)
    return np.array(out)


def tokens(batch: int, length: int = 7, seed: int = 0) -> np.ndarray:
    """Different rows, so that a mixed-up row shows."""
    return np.random.default_rng(seed).integers(0, 300, size=(batch, length))
