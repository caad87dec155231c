"""How a model directory wants its hidden states pooled: modules.json and 1_Pooling/config.json, as
sentence-transformers writes them. A directory without them is pooled at its last token and normalised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout_server.engine.messages.options import Embedding, PoolingKind

MODULES, POOLING = "modules.json", "1_Pooling"
KINDS: tuple[tuple[str, PoolingKind], ...] = (("lasttoken", "last"), ("mean", "mean"))
FLAG = "pooling_mode_"


def read_embedding(directory: Path, config: Mapping[str, Any], width: int) -> Embedding:
    """`config` is the model's config.json; `width` that of its hidden states."""
    try:
        _require_causal(config)
        pooling, normalise = _read(directory)
    except _Refused as error:
        return Embedding(width=width, refusal=str(error))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Embedding(
            width=width,
            refusal=f"The sentence-transformers files of this model cannot be read ({type(error).__name__}: {error}).",
        )
    return Embedding(pooling, normalise, width, "")


class _Refused(Exception):
    """A sentence for whoever asks for embeddings."""


def _require_causal(config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config") or {}):
        if part.get("is_causal") is False or part.get("use_bidirectional_attention"):
            raise _Refused(
                "This model's embeddings need attention in both directions, and it is served as a causal decoder."
            )


def _read(directory: Path) -> tuple[PoolingKind, bool]:
    """How to pool, and whether to normalise."""
    if not (directory / MODULES).is_file():
        return _pooling(directory / POOLING), True
    pooling, normalise = _pooling(directory / POOLING), False
    for module in json.loads((directory / MODULES).read_text(encoding="utf-8")):
        match str(module["type"]).rpartition(".")[-1]:
            case "Transformer":
                continue
            case "Pooling":
                pooling = _pooling(directory / str(module["path"]))
            case "Normalize":
                normalise = True
            case other:
                raise _Refused(f"{MODULES} of this model has a module of type {other}, which is not supported.")
    return pooling, normalise


def _pooling(folder: Path) -> PoolingKind:
    if not (folder / "config.json").is_file():
        return "last"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Newer files have one name or a list of them, older ones a flag for each.
    given = config.get("pooling_mode")
    named = [given] if isinstance(given, str) else list(given or ())
    flags = [key.removeprefix(FLAG) for key, value in config.items() if key.startswith(FLAG) and value is True]
    modes = [str(mode).removesuffix("_token").removesuffix("_tokens") for mode in named or flags]
    found = [kind for name, kind in KINDS if modes == [name]]
    if not found:
        known = " and ".join(name for name, _ in KINDS)
        raise _Refused(f"This model is pooled by {' and '.join(modes) or 'nothing'}; supported are {known}.")
    return found[0]
