"""What is said of a model directory that cannot be served."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REASON = 400
"""Characters shown of an error: mlx-lm lists every parameter that is missing."""
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    AttributeError,
    RuntimeError,
    IndexError,
    ZeroDivisionError,
    AssertionError,
)
"""What mlx-lm, transformers and the libraries below them raise for files that they do not expect."""


def named(path: Path, config: Mapping[str, Any]) -> str:
    """What a sentence calls a model."""
    return f"The model at {path} ({config.get('model_type', 'no model_type')})"


def refused(path: Path, config: Mapping[str, Any], faults: list[str] | tuple[str, ...]) -> str:
    """What is said of one that is understood, and would be computed otherwise."""
    listed = "; ".join(faults)
    return f"{named(path, config)} would not be here what it is in transformers: {listed}."


def unreadable(path: Path, config: dict[str, Any], error: Exception) -> str:
    """What is said of one whose reading ended in an error."""
    model = named(path, config)
    if "trust_remote_code" in str(error):
        return (
            f"{model} needs code of its own to be run, which this server never does: take a model of a family that "
            "mlx-lm and transformers know, or a copy without custom code."
        )
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= REASON else f"{reason[:REASON]}…"
    family = _family_at_fault(error)
    if isinstance(error, KeyError | AttributeError | TypeError) or family or not reason:
        reason = f"{type(error).__name__}: {reason}"
    if family:
        reason = f"mlx-lm's {family} cannot be made from these values of config.json, and ends in {reason}"
    return f"{model} could not be loaded: {reason.removesuffix('.')}.{_perhaps(path, config)}"


def _family_at_fault(error: Exception) -> str | None:
    """The module of mlx-lm's models whose own code raised this: its message says nothing to who wrote a file."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = Path(last[0].filename) if last else Path()
    return where.stem if where.parts[-3:-1] == ("mlx_lm", "models") else None


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
