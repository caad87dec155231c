"""Where a model has its hidden states, and how its directory wants them pooled into one vector.

The part that gives them ends before the head. modules.json and 1_Pooling/config.json are read as
sentence-transformers writes them; a directory without them is pooled at its last token and normalised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from rollout_server.engine.messages.options import Embedding, PoolingKind

PLACES = (
    "model",
    "transformer",
    "backbone",
    "language_model.model",
    "language_model.transformer",
    "language_model.backbone",
)
"""What mlx-lm calls it, the layers of a vision model in front."""

T = TypeVar("T")
UNFIT = (ValueError, TypeError, AttributeError, RuntimeError, IndexError, NotImplementedError)
"""What a model class raises that is called in a way it was not written for."""
MODULES, POOLING = "modules.json", "1_Pooling"
KINDS: tuple[tuple[str, PoolingKind], ...] = (("lasttoken", "last"), ("mean", "mean"))
FLAG = "pooling_mode_"


def find_trunk(module: nn.Module, vocabulary: int) -> tuple[str, int] | None:
    """The path of the part that gives hidden states [B, N, width] after the final norm, and their width; None for a
    model that has no such part."""
    for place in trunk_places(module):
        width = _width(module, attrgetter(place)(module))
        if width is not None and width != vocabulary:
            return place, width
    return None


def trunk_places(module: nn.Module) -> Iterator[str]:
    """Paths at which a part may be that gives hidden states after the final norm."""
    for place in PLACES:
        *above, _ = place.split(".")
        try:
            owner = attrgetter(".".join(above))(module) if above else module
            trunk = attrgetter(place)(module)
        except AttributeError:
            continue
        # A norm beside it would come after it.
        if isinstance(trunk, nn.Module) and not any("norm" in name for name in owner.children()):
            yield place


def _width(module: nn.Module, trunk: nn.Module) -> int | None:
    """The width of what the part returns, if that is one vector a token."""
    tokens = mx.array([[0, 0]], dtype=mx.int32)
    try:
        hidden = trunk(tokens, cache=make_prompt_cache(module))
    except UNFIT:
        return None
    if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
        return None
    return int(hidden.shape[-1])


def read_embedding(directory: Path, config: Mapping[str, Any], width: int) -> Embedding:
    """`config` is the model's config.json; `width` that of its hidden states."""
    try:
        _require_causal(config)
        pooling, normalise = read_modules(directory, _pooling, _no_module)
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


def _no_module(kind: str) -> _Refused:
    return _Refused(f"{MODULES} of this model has a module of type {kind}, which is not supported.")


def _require_causal(config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config") or {}):
        if part.get("is_causal") is False or part.get("use_bidirectional_attention"):
            raise _Refused(
                "This model's embeddings need attention in both directions, and it is served as a causal decoder."
            )


def read_modules(
    directory: Path, pooling_of: Callable[[Path], T], refused: Callable[[str], Exception]
) -> tuple[T, bool]:
    """The pooling that a directory of sentence-transformers names, as `pooling_of` reads its folder, and whether
    vectors are normalised. Raises what `refused` makes of the type of a module that is neither."""
    if not (directory / MODULES).is_file():
        return pooling_of(directory / POOLING), True
    pooling, normalise = pooling_of(directory / POOLING), False
    for module in json.loads((directory / MODULES).read_text(encoding="utf-8")):
        match str(module["type"]).rpartition(".")[-1]:
            case "Transformer":
                continue
            case "Pooling":
                pooling = pooling_of(directory / str(module["path"]))
            case "Normalize":
                normalise = True
            case other:
                raise refused(other)
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
