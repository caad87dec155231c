"""The content hash of an adapter, computed by the trainer itself: numpy and hashlib only.

SHA-256 of the JSON (sorted keys, no spaces) `{"kind", "modules": {NAME: {"rank", "scale"}}}`, then per tensor, sorted
by name, the line `NAME DTYPE SHAPE\\n` and its little-endian bytes in PEFT layout (A [r, in], B [out, r], DoRA's
magnitude [out]; of stacked experts A [experts, r, in] and B [experts, out, r]). It depends on the weights alone: PEFT
and mlx-lm files of one adapter, in any order, have one digest. The server computes the same from what it received, so
equality proves that nothing was lost, transposed or scaled differently on the way.

A dense tensor's name is the path of the base's parameter (`lm_head.weight`): all of a file of kind `delta` or `full`
(mlx-lm's `fine_tune_type: full` is the same), which has no modules, and what PEFT's `modules_to_save` adds to others.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer_client.adapter.patterns import PatternTable
from trainer_client.wire.safetensors_file import HostTensor

_MAGNITUDE = "lora_magnitude_vector"
_PEFT_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_PEFT_RENAMED = re.compile(r"(.*\.)?(experts(\.base_layer)*|experts\.\d+\..+|language_model\..+)")
"""Layers that only the server can call by the base's own names."""
_PEFT_EMBEDDING = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_embedding_([AB])(?:\.[^.]+)?")
_PEFT_MAGNITUDE = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_MLX_NAME = re.compile(r"(.+)\.lora_([ab])")
_MLX_EMBEDDING = re.compile(r"(.+\.)?(wte|[^.]*emb[^.]*)\.lora_[ab]")
"""Names of embeddings. Only the server knows whether the head shares the weight, and is then adapted with it."""
_MLX_MAGNITUDE = re.compile(r"(.+)\.m")
_PEFT_DENSE = re.compile(
    r"(?:base_model\.model\.)?((?!.*\.lora_).+?)(?:\.modules_to_save(?:\.[^.]+)?|\.base_layer)?\.([^.]+)"
)
_PEFT_PREFIX = "base_model.model."


def adapter_digest(tensors: Mapping[str, HostTensor], config: Mapping[str, Any]) -> str | None:
    """`sha256:` and 64 hex digits of a LoRA, rsLoRA or DoRA adapter or of dense tensors; None for what has no digest
    here (embeddings in mlx-lm's form, and what transformers and mlx-lm call or stack differently: experts, adapted
    parameters, a text model inside one that sees).

    `tensors` and `config` are as PEFT or mlx-lm saves them; which of the two is read from the tensor names."""
    kind = adapter_kind(config)
    if kind in ("delta", "full"):
        prefix = "" if "fine_tune_type" in config else _PEFT_PREFIX
        dense = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        return _hashed({"kind": kind, "modules": {}}, dense)
    named = _peft_layout(tensors)
    if named is None or kind is None or config.get("target_parameters"):
        return None
    ranks = {name.removesuffix(".lora_A"): t.shape[-2] for name, t in named.items() if name.endswith(".lora_A")}
    try:
        scales = _scales(ranks, config)
    except (TypeError, ValueError, ArithmeticError, re.error):
        return None  # a configuration that the server refuses, with a better sentence
    if scales is None:
        return None
    modules = {module: {"rank": rank, "scale": scales[module]} for module, rank in ranks.items()}
    magnitudes = {name for name in named if name.endswith(f".{_MAGNITUDE}")}
    if magnitudes != ({f"{module}.{_MAGNITUDE}" for module in modules} if kind == "dora" else set()):
        return None
    return _hashed({"kind": kind, "modules": modules}, named)


def _hashed(head: Mapping[str, Any], named: Mapping[str, HostTensor]) -> str:
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
    for name in sorted(named):
        tensor = named[name]
        shape = json.dumps(list(tensor.shape), separators=(",", ":"))
        digest.update(f"{name} {tensor.dtype} {shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


def _peft_layout(tensors: Mapping[str, HostTensor]) -> dict[str, HostTensor] | None:
    """Tensors as `NAME.lora_A` [r, in], `NAME.lora_B` [out, r] and `NAME.lora_magnitude_vector` [out]; None if any is
    something else. Whole tensors beside them have the path of the base's parameter."""
    named = {}
    by_peft = any(".lora_A" in name or ".lora_embedding_A" in name for name in tensors)
    for given, tensor in tensors.items():
        if tensor.array.ndim == 1 and (match := _PEFT_MAGNITUDE.fullmatch(given) or _MLX_MAGNITUDE.fullmatch(given)):
            named[f"{match[1]}.{_MAGNITUDE}"] = tensor
        elif tensor.array.ndim == 3 and (match := _MLX_NAME.fullmatch(given)):
            named[f"{match[1]}.lora_{match[2].upper()}"] = tensor  # Stacked experts are stored as they are hashed.
        elif by_peft and (match := _PEFT_DENSE.fullmatch(given)):
            named[f"{match[1]}.{match[2]}"] = tensor
        elif tensor.array.ndim != 2 or _MLX_EMBEDDING.fullmatch(given):
            return None
        elif match := _PEFT_NAME.fullmatch(given) or _PEFT_EMBEDDING.fullmatch(given):
            if _PEFT_RENAMED.fullmatch(match[1]):
                return None
            named[f"{match[1]}.lora_{match[2]}"] = tensor
        elif match := _MLX_NAME.fullmatch(given):
            named[f"{match[1]}.lora_{match[2].upper()}"] = HostTensor(tensor.dtype, tensor.array.T)
        else:
            return None
    return named


def adapter_kind(config: Mapping[str, Any]) -> str | None:
    """`lora`, `dora`, `delta` or `full`, by what adapter_config.json holds; None for others."""
    if config.get("kind") in ("delta", "full"):
        return str(config["kind"])
    kind = config.get("peft_type") or config.get("fine_tune_type") or config.get("kind") or "lora"
    name = str(getattr(kind, "value", kind)).lower()
    if name == "lora" and config.get("use_dora"):
        return "dora"
    return name if name in ("lora", "dora", "full") else None


def _scales(ranks: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, float] | None:
    """alpha/r, or alpha/√r for rsLoRA, or mlx-lm's own scale: rounded to float32, as its shortest decimal. None where
    the configuration gives none."""
    if "lora_parameters" in config:
        own = dict(config["lora_parameters"]).get("scale")
        return None if own is None else dict.fromkeys(ranks, _shortest(own))
    alphas, patterns = (PatternTable(config.get(field) or {}) for field in ("alpha_pattern", "rank_pattern"))
    scales = {}
    for module, rank in ranks.items():
        alpha = alphas.first(module, config.get("lora_alpha"))
        if alpha is None:
            return None
        divisor = patterns.first(module, config.get("r", rank))
        scales[module] = _shortest(alpha / (math.sqrt(divisor) if config.get("use_rslora") else divisor))
    return scales


def _shortest(scale: float) -> float:
    return float(str(np.float32(scale)))
