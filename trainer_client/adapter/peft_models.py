"""The adapter that a peft model wears, as it acts now: which one is active, and how strongly in every layer.

A layer's scale may have been changed after it was made (`set_scale`, `scale_layer`, `rescale_adapter_scale`), of which
the configuration says nothing. PEFT is not imported: its layers are known by what they hold.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainer_client.adapter.patterns import PatternTable
from trainer_client.adapter.wrappers import unwrapped_name

HOLDERS = ("lora_A", "lora_embedding_A", "modules_to_save")
"""Children of a layer that hold something for each of its adapters, by name."""
PREFIX = "base_model.model."
"""What PEFT puts in front of the base's names."""


def bare_model(source: Any) -> Any:
    """The peft model inside of what compiles it or spreads it over devices; anything else as it is."""
    while hasattr(source, "named_children"):
        # Children, not attributes: PEFT's models answer for those of the model inside of them.
        inside = dict(source.named_children())
        inner = inside.get("_orig_mod")
        if inner is None and not hasattr(source, "peft_config"):
            inner = inside.get("module")
        if inner is None:
            break
        source = inner
    return source


def peft_adapter(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and config of the active adapter of a peft model, or of a transformers model with one, as PEFT saves
    them; ranks and scales are those of the layers. Raises `ValueError` unless exactly one adapter acts, in all of its
    layers."""
    active = model.active_adapters
    names = list(active() if callable(active) else active)  # a method in transformers, a property in peft
    if len(names) != 1:
        raise ValueError(f"The model has {len(names)} active adapters ({names}): activate one with set_adapter.")
    name = names[0]
    for path, module in model.named_modules():
        _refuse_other_effect(path, module, name)
    # Left to itself, PEFT would add the base's own embedding table where that is a target, and ask the Hub about it.
    state = sys.modules["peft"].get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return state, _as_trained(model.peft_config[name].to_dict(), _layers(model, name))


def _refuse_other_effect(path: str, module: Any, name: str) -> None:
    """Raises `ValueError` where a layer computes something else than the base with adapter `name`."""
    held = {key for part, child in module.named_children() if part in HOLDERS for key in child}
    if not held:
        return
    if name in held and module.disable_adapters is True:
        raise ValueError(
            f"The adapter {name!r} is disabled in {path}, so the model computes what the base does: enable it before "
            "it is pushed."
        )
    merged = [other for other in getattr(module, "merged_adapters", ()) if other != name]
    if merged:
        raise ValueError(f"{path} has {merged} merged into its weights, which would stay behind: unmerge them first.")
    acting = [other for other in module.active_adapters if other in held]
    if acting != [name] * (name in held):
        raise ValueError(
            f"{path} computes with the adapters {acting}, though {name!r} is the active one: activate one with "
            "set_adapter."
        )


def _layers(model: Any, name: str) -> Iterator[tuple[str, int, float]]:
    """(What patterns match, rank, scale) of each layer that adapter `name` has."""
    for path, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, Mapping) or name not in scaling:
            continue
        key = unwrapped_name(path.removeprefix(PREFIX))
        if hasattr(module, "parameter_name"):  # of several on one module each wraps the next
            key = f"{key.replace('.base_layer', '')}.{module.parameter_name}"
        scale = float(scaling[name])
        if not math.isfinite(scale):
            raise ValueError(f"The scale of {path} is {scale}, so it computes nothing that could be served.")
        yield key, int(module.r[name]), scale


def _as_trained(config: dict[str, Any], layers: Iterator[tuple[str, int, float]]) -> dict[str, Any]:
    """The configuration, with patterns for layers whose rank or scale it does not give; itself where there are none."""
    ranks, alphas = (dict(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern"))
    given_ranks, given_alphas = PatternTable(ranks), PatternTable(alphas)
    own_ranks: dict[str, int] = {}
    own_alphas: dict[str, float] = {}
    for key, rank, scale in layers:
        given = given_ranks.first(key, config.get("r"))
        if given != rank:
            own_ranks[_exactly(key)] = rank
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        alpha = given_alphas.first(key, config.get("lora_alpha"))
        if alpha is None or np.float32(alpha / divisor) != np.float32(scale):
            # Of a float32 the product with a rank is exact, and with its root close enough to come back to it.
            own_alphas[_exactly(key)] = float(np.float32(scale)) * divisor
    if not own_ranks and not own_alphas:
        return config
    return config | {"rank_pattern": _in_front(own_ranks, ranks), "alpha_pattern": _in_front(own_alphas, alphas)}


def _in_front(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The first pattern that matches counts."""
    return {**own, **{pattern: value for pattern, value in others.items() if pattern not in own}}


def _exactly(key: str) -> str:
    return f"^{re.escape(key)}$"
