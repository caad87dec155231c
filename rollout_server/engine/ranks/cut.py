"""Cutting a model over ranks, by what mlx-lm's class says of itself, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from adapters.resident.cuts import Cut, Side
from adapters.resident.model_layers import adaptable_layers, holder, own_layers
from rollout_server.engine.ranks.ranks import Ranks
from rollout_server.errors import EngineUnavailable

HEADS = ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads")
TEXT = ("text_config", "llm_config", "language_config")
"""Where a model of pictures keeps what is said of its text."""


@dataclass(frozen=True, slots=True, eq=False)
class CutModel:
    """What is known of a model of which this rank has a part, or all."""

    layers: dict[str, tuple[int, int]]
    """Path → (out, in) of what an adapter may target, as the layers are whole."""
    own: dict[str, tuple[int, int]]
    """The same, of this rank's parts."""
    cuts: dict[str, Cut]
    """How each of those layers is cut that is."""
    unclear: str = ""
    """Why adapters do not know which part of a layer is theirs, a half sentence; empty where they do."""


def whole(module: nn.Module) -> CutModel:
    """What is known of a model of which this process has all."""
    layers = adaptable_layers(module)
    return CutModel(layers, layers, {})


def refuse_uncut(config: Mapping[str, Any], cls: type[nn.Module], size: int) -> None:
    """Raises `EngineUnavailable` where a class cannot be cut into so many parts; `config` is what config.json says."""
    family = config.get("model_type", cls.__module__.rpartition(".")[2])
    if not hasattr(cls, "shard"):
        raise EngineUnavailable(
            f"--tensor-parallel {size} cannot serve a {family} model: mlx-lm's class for it has no shard(), so nothing "
            "says how its layers are cut. Leave the option out, or serve several whole copies with --replicas."
        )
    text = next((config[name] for name in TEXT if isinstance(config.get(name), Mapping)), config)
    for name in HEADS:
        heads = text.get(name)
        if isinstance(heads, int) and heads % size:
            raise EngineUnavailable(
                f"--tensor-parallel {size} cannot serve this {family} model: its {name} is {heads}, which {size} ranks "
                "cannot share out evenly. Give a number of ranks that divides it."
            )


def cut(module: Any, ranks: Ranks, config: Mapping[str, Any]) -> CutModel:
    """Leaves this rank its part of a module whose weights were not read yet. Raises `EngineUnavailable` where it cannot
    be cut: on every rank alike, before any of them waits for another."""
    refuse_uncut(config, type(module), ranks.size)
    if "vision_config" in config:
        raise EngineUnavailable(
            f"--tensor-parallel {ranks.size} serves models of text, and this {config.get('model_type')} model sees "
            "pictures: leave the option out, or take a copy without its tower."
        )
    layers = adaptable_layers(module)
    weights = {path: _weight(module, path) for path in _first_of_each(layers)}
    try:
        module.shard(ranks.group)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise EngineUnavailable(
            f"--tensor-parallel {ranks.size} cannot serve this {config.get('model_type')} model, whose layers it does "
            f"not divide: {' '.join(str(error).split())[:300]}"
        ) from error
    own = own_layers(module, layers)
    cuts = {path: Cut(side, ranks.group) for path in layers if (side := _side(layers[path], own[path])) is not None}
    wrong = [path for path, weight in weights.items() if not _is_part(module, path, weight, cuts.get(path))]
    return CutModel(layers, own, cuts, f"mlx-lm cuts {wrong[0]} in an order of its own" if wrong else "")


def _first_of_each(layers: Mapping[str, tuple[int, int]]) -> list[str]:
    """A layer for each name and shape: blocks of one kind are cut alike."""
    seen: dict[tuple[str, tuple[int, ...]], str] = {}
    for path, shape in layers.items():
        if type(shape) is tuple:
            seen.setdefault((path.rpartition(".")[2], tuple(shape)), path)
    return list(seen.values())


def _weight(module: nn.Module, path: str) -> mx.array:
    parent, name = holder(module, path)
    weight: mx.array = parent[name]["weight"]
    return weight


def _side(whole: tuple[int, int], own: tuple[int, int]) -> Side | None:
    if tuple(whole) == tuple(own):
        return None
    return "outputs" if whole[1] == own[1] else "inputs"


def _is_part(module: nn.Module, path: str, whole: mx.array, cut: Cut | None) -> bool:
    """Returns whether a rank's weight is the part of the whole one that `Cut` takes it for. Packed values are cut at
    the same places."""
    weight = _weight(module, path)
    if cut is None:
        return weight.shape == whole.shape
    part = whole[cut.own(whole.shape[0])] if cut.side == "outputs" else whole[:, cut.own(whole.shape[1])]
    return weight.shape == part.shape and bool(mx.array_equal(weight, part))
