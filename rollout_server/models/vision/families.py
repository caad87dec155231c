"""Which vision models there are: for each model type what makes its tower, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from rollout_server.models.vision.family import VisionFamily
from rollout_server.models.vision.gemma3 import gemma3
from rollout_server.models.vision.idefics3 import idefics3
from rollout_server.models.vision.llava import llava
from rollout_server.models.vision.pixtral import mistral3, pixtral
from rollout_server.models.vision.qwen2_vl import qwen2_5_vl, qwen2_vl
from rollout_server.models.vision.qwen3_vl import qwen3_vl

WRAPPED = ".vision_model."
"""What published files have in a tower's names where transformers wraps SigLIP or CLIP, and writes no more itself."""

COLOURS = 3


@dataclass(frozen=True, slots=True)
class VisionKind:
    make: Callable[[Mapping[str, Any]], VisionFamily]
    """Takes config.json as transformers settles it. Raises `ValueError`, `KeyError` or `TypeError` for a tower that is
    not computed here."""
    parts: tuple[str, ...]
    """How the names of its tensors begin, `model.` in front or not."""
    inside: tuple[str, ...] = ()
    """Which of these are no part of the tower's own names."""
    unread: tuple[str, ...] = ()
    """Parts of a tower that no feature depends on."""

    def named(self, weights: Mapping[str, mx.array], family: VisionFamily) -> dict[str, mx.array]:
        """The tower's tensors of a checkpoint under its own names, kernels of convolutions as products. What the tower
        does not have keeps its name, so that strict loading refuses it."""
        arrays: list[tuple[str, mx.array]] = tree_flatten(family.tower.parameters())  # type: ignore[assignment]
        shapes = {name: value.shape for name, value in arrays}
        found: dict[str, mx.array] = {}
        for name, value in weights.items():
            if not self.holds(name):
                continue
            own = name.removeprefix("model.")
            for prefix in self.inside:
                own = own.removeprefix(prefix)
            own = own.replace(WRAPPED, ".", 1) if own not in shapes else own
            if not any(own.startswith(part) for part in self.unread):
                found[own] = _product(value) if value.ndim > 2 and len(shapes.get(own, ())) == 2 else value
        return found

    def holds(self, name: str) -> bool:
        """True for a tensor of the tower."""
        return name.removeprefix("model.").startswith(self.parts)


def _product(kernel: mx.array) -> mx.array:
    """[out, channels, …] of a convolution → [out, channels · …]. mlx-vlm writes channels last."""
    channels_last = kernel.shape[-1] == COLOURS != kernel.shape[1]
    return (mx.moveaxis(kernel, -1, 1) if channels_last else kernel).flatten(1)


_PROJECTED = ("vision_tower.", "multi_modal_projector.")
_NAMED = ("visual.", "vision_tower.")
"""Qwen's own name and mlx-vlm's."""
_SIGLIP_UNREAD = ("vision_tower.head.", "vision_tower.embeddings.position_ids")
_CLIP_UNREAD = ("vision_tower.post_layernorm.", "vision_tower.embeddings.position_ids")
_TILED = VisionKind(idefics3, ("vision_model.", "connector."), unread=("vision_model.embeddings.position_ids",))
KINDS: Mapping[str, VisionKind] = MappingProxyType(
    {
        "qwen2_vl": VisionKind(qwen2_vl, _NAMED, inside=_NAMED),
        "qwen2_5_vl": VisionKind(qwen2_5_vl, _NAMED, inside=_NAMED),
        "qwen3_vl": VisionKind(qwen3_vl, _NAMED, inside=_NAMED),
        "qwen3_vl_moe": VisionKind(qwen3_vl, _NAMED, inside=_NAMED),
        "gemma3": VisionKind(gemma3, _PROJECTED, unread=_SIGLIP_UNREAD),
        "llava": VisionKind(llava, _PROJECTED, unread=_CLIP_UNREAD),
        "mistral3": VisionKind(mistral3, _PROJECTED),
        "idefics3": _TILED,
        "smolvlm": _TILED,
    }
)
"""By config.json's `model_type`."""
PIXTRAL = VisionKind(pixtral, _PROJECTED)
"""`llava` whose tower is Pixtral's."""
TOWERS: Mapping[str, Mapping[str, VisionKind]] = MappingProxyType(
    {
        "llava": {"clip_vision_model": KINDS["llava"], "pixtral": PIXTRAL},
        "gemma3": {"siglip_vision_model": KINDS["gemma3"]},
        "mistral3": {"pixtral": KINDS["mistral3"]},
    }
)
"""By the `model_type` of `vision_config`, where a model may have one of several."""


def kind_of(config: Mapping[str, Any]) -> VisionKind | None:
    """None where no such tower of this model type is known, and for a text model cut out of a larger one."""
    fields, kind = config.get("vision_config"), str(config.get("model_type"))
    if not isinstance(fields, Mapping):
        return None
    inner = fields.get("model_type")
    return TOWERS[kind].get(str(inner)) if kind in TOWERS and inner is not None else KINDS.get(kind)
