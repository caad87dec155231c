"""Reads the tower of a vision model: its part of config.json as transformers settles it, and its tensors, every one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from transformers import CONFIG_MAPPING

from rollout_server.engine.model.checkpoint.files import WEIGHTS
from rollout_server.engine.model.checkpoint.meaning import UNREADABLE as UNSETTLED
from rollout_server.engine.model.checkpoint.meaning import plain
from rollout_server.errors import EngineUnavailable
from rollout_server.models.vision.families import KINDS, VisionKind, kind_of
from rollout_server.models.vision.family import VisionFamily

log = logging.getLogger("rollout_server.engine.model")

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError)
"""What MLX raises for files that it does not expect, and what a tower raises for values that it does not compute."""
REASON = 400
"""Characters shown of an error: MLX lists every parameter that is missing."""


def read_vision(directory: Path, config: Mapping[str, Any]) -> VisionFamily | None:
    """The tower with its weights, in memory; None for a model without one, and for one whose tower is not known here,
    which is then served as a text model and the log says so. Raises `EngineUnavailable` where a tower of a known family
    would not be here what it is in transformers."""
    kind = kind_of(config)
    if kind is None:
        if isinstance(config.get("vision_config"), Mapping):
            log.warning(
                "The vision half of %s (%s) is not computed here, so that it is served as a text model and refuses "
                "pictures; with pictures are served %s.",
                directory, config.get("model_type"), ", ".join(sorted(KINDS)),
            )  # fmt: skip
        return None
    weights = _weights(directory, kind)
    if not weights:
        log.warning("%s holds no tensors of a vision tower: it is served as a text model.", directory)
        return None
    try:
        family = kind.make(settled(config))
        named = kind.named(_unpacked(weights, config), family)
        family.tower.load_weights(list(named.items()), strict=True)
        _place(family)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError | AttributeError | TypeError):
            reason = f"{type(error).__name__}: {reason}"
        shown = reason if len(reason) <= REASON else f"{reason[:REASON]}…"
        raise EngineUnavailable(
            f"The vision half of the model at {directory} ({config.get('model_type')}) could not be loaded: "
            f"{shown.removesuffix('.')}."
        ) from error
    return family


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of transformers, in the names that towers know. Raises `ValueError` where
    transformers does not read it."""
    raw = plain(dict(config))
    try:
        read = CONFIG_MAPPING[str(raw["model_type"])].from_dict(raw)
        whole: dict[str, Any] = plain(read.to_dict())
        return whole | {"image_token_id": read.image_token_id}
    except UNSETTLED as error:
        raise ValueError(f"transformers does not read this config.json ({error})") from error


def _weights(directory: Path, kind: VisionKind) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(directory.glob(WEIGHTS)):
        tensors: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]  # A safetensors file is a dictionary.
        found |= {name: array for name, array in tensors.items() if kind.holds(name)}
    return found


def _unpacked(weights: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Layers that mlx-vlm packs, as products of whole numbers would gain a tower little and cost its precision."""
    packing = config.get("quantization") or {}
    found = dict(weights)
    for name in [name for name in weights if name.endswith(".scales")]:
        layer = name.removesuffix(".scales")
        own = packing.get(layer)
        said = {key: (own if isinstance(own, Mapping) else packing).get(key) for key in ("group_size", "bits", "mode")}
        parts = [found.pop(f"{layer}.{part}", None) for part in ("weight", "scales", "biases")]
        if parts[0] is None or parts[1] is None:
            raise ValueError(f"{layer} is packed, and a part of it is missing")
        found[f"{layer}.weight"] = mx.dequantize(
            parts[0], parts[1], parts[2], said["group_size"], said["bits"], said["mode"] or "affine"
        )
    return found


def _place(family: VisionFamily) -> None:
    """In memory, ready to see. On the CPU all is float32, as bf16 and f16 products do not go through BLAS there."""
    if mx.default_device() == mx.cpu:
        family.tower.update(tree_map(lambda array: array.astype(mx.float32), family.tower.parameters()))
    family.tower.eval()
    family.tower.freeze()
    mx.eval(family.tower.parameters())


def nbytes(family: VisionFamily) -> int:
    """What the tower's weights fill."""
    arrays: list[tuple[str, mx.array]] = tree_flatten(family.tower.parameters())  # type: ignore[assignment]
    return sum(array.nbytes for _, array in arrays)
