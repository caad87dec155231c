"""Tiny classifiers and reward models on disk: a tiny decoder without its output layer, and a head beside it, named as
transformers names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from safetensors.numpy import load_file, save, save_file

from adapters.bundle import AdapterBundle
from adapters.formats.read import read_bundle
from rollout_server.engine.messages.options import ModelInfo
from rollout_server.engine.model.load import read_model
from tests.support import tiny_models

CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "qwen2": "Qwen2", "gemma2": "Gemma2", "gemma3_text": "Gemma3Text"}
HIDDEN = int(tiny_models.SHARED["hidden_size"])


def build(
    family: str,
    directory: Path,
    *,
    head: Mapping[str, np.ndarray] | None = None,
    labels: int = 1,
    what: str = "SequenceClassification",
    bias: bool = False,
    **config: Any,
) -> Path:
    """A tiny decoder that scores. `head` takes the place of a random one with so many labels; `config` goes into
    config.json, and None takes a field out of it."""
    tiny_models.build(family, directory)
    path = directory / "model.safetensors"
    weights = {name: array for name, array in load_file(path).items() if not name.startswith("lm_head")}
    save_file({**weights, **(random_head(labels, bias=bias) if head is None else head)}, path)
    said = json.loads((directory / "config.json").read_text())
    said |= {"architectures": [f"{CLASSES[family]}For{what}"], **config}
    if labels != 2 and head is None:
        said = {"id2label": {str(at): f"LABEL_{at}" for at in range(labels)}, **said}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    return directory


def random_head(labels: int, *, bias: bool = False, seed: int = 5, name: str = "score") -> dict[str, np.ndarray]:
    """`score.weight` [labels, hidden] and, if asked for, `score.bias`, float32."""
    generator = np.random.default_rng(seed)
    head = {f"{name}.weight": generator.normal(size=(labels, HIDDEN)).astype(np.float32) / HIDDEN**0.5}
    return head | ({f"{name}.bias": generator.normal(size=labels).astype(np.float32)} if bias else {})


def reward_adapter(
    info: ModelInfo,
    seed: int = 1,
    *,
    labels: int = 1,
    task_type: str = "SEQ_CLS",
    head: Mapping[str, np.ndarray] | None = None,
    rank: int = 4,
    **options: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(Tensors, adapter_config.json) as PEFT saves an adapter of this kind with its head; `options` are those of
    `tiny_models.random_adapter`."""
    tensors, config = tiny_models.random_adapter(info.layers, rank, seed, **options)
    own = random_head(labels, bias=task_type == "TOKEN_CLS", seed=seed + 50) if head is None else head
    saved = {f"base_model.model.{name}": array for name, array in own.items()}
    return {**tensors, **saved}, {**config, "task_type": task_type, "modules_to_save": ["classifier", "score"]}


def reward_bundle(info: ModelInfo, seed: int = 1, **options: Any) -> AdapterBundle:
    return bundle(info, *reward_adapter(info, seed, **options))


def bundle(info: ModelInfo, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> AdapterBundle:
    """What the server makes of such a file."""
    return read_bundle(save(dict(tensors)), config, layers=info.layers, parameters=info.weights, scoring=info.scoring)


def states(directory: Path, tokens: Sequence[int]) -> np.ndarray:
    """Hidden states [length, hidden] of one whole sequence: mlx-lm's own layers, no chunks, no batch."""
    module = read_model(directory).module
    return np.array(module(mx.array([list(tokens)]), cache=make_prompt_cache(module))[0].astype(mx.float32))


def scores(directory: Path, tokens: Sequence[int], *, name: str = "score") -> np.ndarray:
    """[length, labels] float64: the head that lies in the directory, at every token."""
    weights = load_file(directory / "model.safetensors")
    return states(directory, tokens).astype(np.float64) @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
