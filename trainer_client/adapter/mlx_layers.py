"""The adapter that an MLX model wears, read off mlx-lm's LoRA and DoRA layers. MLX is not imported: layers are known by
the names of their classes, arrays are only handed on.

One rank and one scale are written as mlx-lm writes them; layers that differ, which mlx-lm's configuration cannot say,
as PEFT does, with patterns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

RANK_AXIS: Mapping[str, int] = MappingProxyType(
    {"LoRALinear": -1, "DoRALinear": -1, "LoRAEmbedding": -1, "DoRAEmbedding": -1, "LoRASwitchLinear": -2}
)
"""Layers of mlx_lm.tuner → where the rank stands in the shape of their `lora_a`."""
SHOWN = 5
"""Names that an error repeats."""


@dataclass(frozen=True, slots=True)
class _Layer:
    path: str
    kind: str
    rank: int
    scale: float
    tensors: Mapping[str, Any]
    """`lora_a`, `lora_b`, and `m` of DoRA."""


def layers_adapter(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, what adapter_config.json would hold). Raises `ValueError` with a sentence for a model without
    such layers, for other parameters that are trained, and for what neither format can say."""
    layers = sorted(_layers(model), key=lambda layer: layer.path)
    if not layers:
        raise ValueError(
            "The model has no LoRA or DoRA layers: put them on with mlx_lm.tuner.utils.linear_to_lora_layers."
        )
    _refuse_other_training(model, {f"{layer.path}.{part}" for layer in layers for part in layer.tensors})
    gains = {layer.kind.startswith("DoRA") for layer in layers}
    if len(gains) > 1:
        raise ValueError("The model mixes LoRA and DoRA layers, and one adapter is either: push them as two names.")
    dora = gains.pop()
    if len({(layer.rank, layer.scale) for layer in layers}) == 1:
        return _as_mlx_lm(layers, dora)
    return _as_peft(layers, dora)


def _layers(model: Any) -> Iterator[_Layer]:
    for path, module in model.named_modules():
        if not hasattr(module, "lora_a"):
            continue
        kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in RANK_AXIS), None)
        if kind is None:
            known = ", ".join(RANK_AXIS)
            raise ValueError(f"{path} is a {type(module).__name__}, which is not read here: {known} are.")
        parts = ("lora_a", "lora_b", "m") if kind.startswith("DoRA") else ("lora_a", "lora_b")
        tensors = {part: getattr(module, part) for part in parts}
        yield _Layer(path, kind, int(tensors["lora_a"].shape[RANK_AXIS[kind]]), float(module.scale), tensors)


def _refuse_other_training(model: Any, own: set[str]) -> None:
    """A parameter that is trained and not pushed would make server and trainer differ without a word."""
    others = sorted(set(_leaves(model.trainable_parameters())) - own)
    if others:
        shown = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
        raise ValueError(
            f"Not only LoRA layers are trained: {shown}. Such weights would stay behind: "
            "freeze the model before it gets its LoRA layers, or push named tensors."
        )


def _leaves(tree: Any, path: str = "") -> Iterator[str]:
    """Paths of the arrays in MLX's nested dicts and lists."""
    match tree:
        case Mapping():
            children: Iterable[tuple[Any, Any]] = tree.items()
        case list() | tuple():
            children = enumerate(tree)
        case _:
            yield path
            return
    for name, child in children:
        yield from _leaves(child, f"{path}.{name}" if path else str(name))


def _as_mlx_lm(layers: Sequence[_Layer], dora: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    first = layers[0]
    # Whole paths are keys too, and name the layers wherever they are; the number of blocks says nothing then.
    parameters = {
        "rank": first.rank,
        "scale": first.scale,
        "dropout": 0.0,
        "keys": [layer.path for layer in layers],
    }
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": -1, "lora_parameters": parameters}
    return {f"{layer.path}.{part}": array for layer in layers for part, array in layer.tensors.items()}, config


def _as_peft(layers: Sequence[_Layer], dora: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    for layer in layers:
        if not layer.kind.endswith("RALinear"):
            raise ValueError(
                f"The layers differ in rank or scale, and only linear layers can be written so; {layer.path} is a "
                f"{layer.kind}. Give all layers one rank and one scale."
            )
    (rank, scale), _ = Counter((layer.rank, layer.scale) for layer in layers).most_common(1)[0]
    tensors: dict[str, Any] = {}
    for layer in layers:
        path = f"base_model.model.{layer.path}"
        tensors[f"{path}.lora_A.weight"] = layer.tensors["lora_a"].T
        tensors[f"{path}.lora_B.weight"] = layer.tensors["lora_b"].T
        if dora:
            tensors[f"{path}.lora_magnitude_vector"] = layer.tensors["m"]
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": dora,
        "target_modules": [layer.path for layer in layers],
        "rank_pattern": {f"^{re.escape(layer.path)}": layer.rank for layer in layers if layer.rank != rank},
        "alpha_pattern": {
            f"^{re.escape(layer.path)}": layer.scale * layer.rank
            for layer in layers
            if layer.scale * layer.rank != scale * rank
        },
    }
