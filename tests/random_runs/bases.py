"""What random sequences are played with: a tiny base, versions of every kind, and by hand the models they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model
from safetensors.numpy import save

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from adapters.spec import Mode, Parameter
from rollout_server.engine.messages.options import EngineOptions
from rollout_server.engine.model.resident import ResidentModel
from tests.support import tiny_models
from tests.support.adapter_files import TwoTables, merge
from tests.support.engine.loaded_models import loaded

KEEP = 2
OPTIONS: dict[str, Any] = {"max_batch": 4, "prefill_tokens": 16, "keep_versions": KEEP}
TABLE, HEAD = "model.embed_tokens", "lm_head.weight"


@dataclass(frozen=True)
class Recipe:
    """A kind of version: what its bundle is made of, and how it is served.

    `adapter` are the options of `tiny_models.random_adapter`; `dense` ends of the names of whole parameters, which are
    all there is to a `delta` or `full` version."""

    seed: int
    adapter: dict[str, Any] | None = None
    dense: tuple[str, ...] = ()
    kind: str = "full"
    mode: Mode | None = None

    def bundle(self, model: ResidentModel, weights: dict[str, np.ndarray]) -> AdapterBundle:
        info = model.info
        whole = {name: self._value(name, weights) for name in info.weights if name.endswith(self.dense or ("\0",))}
        config: dict[str, Any] = {"kind": self.kind}
        tensors: dict[str, np.ndarray] = {}
        if self.adapter is not None:
            tensors, config = tiny_models.random_adapter(info.layers, seed=self.seed, **self.adapter)
            whole = {f"base_model.model.{name}": value for name, value in whole.items()}
            config |= {"modules_to_save": sorted(name.split(".")[-2] for name in whole)} if whole else {}
        return read_bundle(save(tensors | whole), config, layers=info.layers, parameters=info.weights)

    def _value(self, name: str, weights: dict[str, np.ndarray]) -> np.ndarray:
        base = weights[name if name in weights else f"{TABLE}.weight"]
        random = np.random.default_rng([self.seed, *name.encode()])
        noise = 0.2 * random.standard_normal(base.shape) * np.std(base)
        return (noise if self.kind == "delta" else base + noise).astype(np.float32)


RECIPES = (
    Recipe(1, {"rank": 2}),
    Recipe(2, {"rank": 4, "kind": "mlx", "targets": ["q_proj", "v_proj"]}),
    Recipe(3, {"rank": 5, "rslora": True, "targets": ["down_proj"]}),
    Recipe(4, {"rank": 9, "targets": ["o_proj", "up_proj", "gate_proj"]}),
    Recipe(5, {"rank": 3, "dora": True}),
    Recipe(6, {"rank": 6, "dora": True, "targets": ["k_proj", "down_proj"]}),
    Recipe(7, {"rank": 2, "targets": ["embed_tokens", "q_proj"]}),
    # The same weights as the first, served in another way: one digest, two contents.
    Recipe(1, {"rank": 2}, mode="merged"),
    Recipe(8, {"rank": 3, "dora": True, "targets": ["v_proj", "up_proj"]}, mode="merged"),
    Recipe(9, {"rank": 3, "targets": ["q_proj", "down_proj"]}, (HEAD,)),
    Recipe(10, None, ("k_proj.weight", "layers.1.mlp.up_proj.weight"), "delta"),
    Recipe(11, None, ("norm.weight", "o_proj.weight")),
    Recipe(12, None, (f"{TABLE}.weight", "layers.0.mlp.down_proj.weight")),
)


@dataclass(frozen=True)
class Push:
    """What a publish is given."""

    bundle: AdapterBundle
    mode: Mode | None = None


@dataclass
class World:
    """A tiny base, the bundles that are pushed, and a model for each with its weights changed by hand."""

    path: Path
    model: ResidentModel
    pushes: list[Push]
    models: dict[str, nn.Module]
    """By digest."""
    arrays: dict[str, mx.array] = field(default_factory=dict)
    """The base's own, by name,"""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    """and what they hold."""

    @classmethod
    def make(cls, path: Path) -> World:
        tiny_models.build("qwen3", path, num_hidden_layers=2)
        model = loaded(EngineOptions(str(path), "tiny", **OPTIONS))
        arrays = dict(tree_flatten(model.module.parameters()))
        weights = {name: np.array(array) for name, array in arrays.items()}
        pushes = [Push(recipe.bundle(model, weights), recipe.mode) for recipe in RECIPES]
        models = {push.bundle.digest: by_hand(load_model(path)[0], push.bundle, model.info.weights) for push in pushes}
        models[model.info.digest] = load_model(path)[0]
        return cls(path, model, pushes, models, arrays, weights)

    def check_base(self) -> None:
        """The very arrays are back, and nobody wrote over them."""
        found = dict(tree_flatten(self.model.module.parameters()))
        assert found.keys() == self.arrays.keys(), found.keys() ^ self.arrays.keys()
        for name, array in found.items():
            assert array is self.arrays[name], f"{name} is another array"
            assert np.array(array).tobytes() == self.weights[name].tobytes(), f"{name} was written over"


def by_hand(model: nn.Module, bundle: AdapterBundle, parameters: dict[str, Parameter]) -> nn.Module:
    """Whole tensors put in place or added, then low-rank ones merged; returns the same model."""
    weights = dict(tree_flatten(model.parameters()))
    given = {name: bundle.tensors[name].float32() for name in bundle.spec.dense}
    if bundle.spec.kind == "delta":
        given = {name: np.array(weights[name]) + value for name, value in given.items()}
    head = given.pop(HEAD, None) if HEAD not in weights else None
    model.update(tree_unflatten([(name, mx.array(value)) for name, value in given.items()]))
    model = merge(model, bundle)
    if head is not None:
        tables = TwoTables(model.model.embed_tokens.weight)
        tables.head = mx.array(head)
        model.model.embed_tokens = tables
    return model
