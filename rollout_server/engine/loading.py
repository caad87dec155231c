"""Reads a model directory into memory with mlx-lm and transformers. Code that a model brings along is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model
from transformers import AutoTokenizer

from rollout_server.errors import EngineUnavailable

REASON = 400
"""Characters shown of an error: mlx-lm lists every parameter that is missing."""


def read_model(path: Path) -> tuple[nn.Module, dict[str, Any], Any, Any]:
    """(module, config, tokenizer for the engine thread, the same for the event loop). Raises `EngineUnavailable` with
    the cause if mlx-lm or transformers cannot read the directory."""
    try:
        module, config = load_model(path, trust_remote_code=False)
        # A tokenizer is not to be shared between threads.
        engine, host = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for _ in range(2))
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise EngineUnavailable(_sentence(path, error)) from error
    return module, config, engine, host


def _sentence(path: Path, error: Exception) -> str:
    config = _read(path / "config.json")
    named = f"The model at {path} ({config.get('model_type', 'no model_type')})"
    if "trust_remote_code" in str(error):
        return (
            f"{named} needs code of its own to be run, which this server never does: take a model of a family that "
            "mlx-lm and transformers know, or a copy without custom code."
        )
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= REASON else f"{reason[:REASON]}…"
    if isinstance(error, KeyError | AttributeError | TypeError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    return f"{named} could not be loaded: {reason.removesuffix('.')}.{_perhaps(path, config)}"


def _perhaps(path: Path, config: dict[str, Any]) -> str:
    """What about the model may be the cause, when the error does not say so itself."""
    packing = config.get("quantization_config")
    method = packing.get("quant_method") if isinstance(packing, dict) else None
    said = "" if method is None else f" Its weights are packed by {method}, of which mlx-lm reads a part only."
    if "auto_map" in config or "auto_map" in _read(path / "tokenizer_config.json"):
        said += " It brings code of its own, which this server never runs."
    return said


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
