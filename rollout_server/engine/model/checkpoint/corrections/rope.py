"""RoPE from what config.json means: what a family's class is told, and the frequencies that it has to turn by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollout_server.engine.model.checkpoint.family import Family

FULL, SLIDING = "full_attention", "sliding_attention"
BASES = ("rope_theta", "rotary_emb_base", "rope_base")
LOCAL_BASES = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta", "local_rope_theta")
PARTS = ("partial_rotary_factor", "rotary_pct", "rope_pct")
PLAIN = frozenset({"default", "mrope"})
"""Positions of text are the same in all parts of a multimodal RoPE."""
YARN = ("yarn", "deepseek_yarn", "telechat3-yarn")
LONG = ("longrope", "su")
KNOWN = PLAIN | {"dynamic", "linear", "llama3", "proportional", *YARN, *LONG}
"""Types that `frequencies` has."""
WHOLE = "mscale_all_dim"
"""The field of YaRN in latent attention: it scales the attention itself, so the class has to be told."""


def is_nested(rope: Mapping[str, Any]) -> bool:
    """Returns whether the parameters are given for each kind of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def parts(rope: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of every kind of layer."""
    return [dict(value) for value in rope.values() if isinstance(value, dict)] if is_nested(rope) else [dict(rope)]


def of_kind(rope: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """The parameters of one kind of layer; None where such layers have no RoPE, or nothing is said of them."""
    found = rope.get(kind) if is_nested(rope) else rope
    return dict(found) if isinstance(found, Mapping) else None


def main_part(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the layers that see everything."""
    return of_kind(rope, FULL) or parts(rope)[0]


def rope_fields(rope: Mapping[str, Any], family: Family, head_dim: int) -> dict[str, Any]:
    """The parameters under the names that the family's class has for them. Scaling is set on the module once it is
    made (`turning`), except where it reaches beyond RoPE."""
    main, local = main_part(rope), of_kind(rope, SLIDING) if is_nested(rope) else None
    found: dict[str, Any] = {}
    if main.get("rope_theta") is not None:
        found |= dict.fromkeys(BASES, main["rope_theta"])
    if local is not None and local.get("rope_theta") is not None:
        found |= dict.fromkeys(LOCAL_BASES, local["rope_theta"])
    found |= dict.fromkeys(PARTS, main.get("partial_rotary_factor") or 1.0)
    found["rotary_dim"] = int(head_dim * (main.get("partial_rotary_factor") or 1.0))
    found["rope_scaling"] = _named(main) if _reaches_further(main, family) else None
    found["rope_parameters"] = (
        {kind: _named(part) for kind, part in rope.items() if isinstance(part, dict)}
        if is_nested(rope)
        else _named(dict(rope))
    )
    return {name: value for name, value in found.items() if name in family.fields}


def _reaches_further(main: Mapping[str, Any], family: Family) -> bool:
    if main.get("rope_type") in PLAIN:
        return False
    # A class that looks for these by name may not do without them.
    return bool(family.words & main.keys() & {WHOLE, "alpha", "short_factor"})


def _named(part: Mapping[str, Any]) -> dict[str, Any]:
    """With its type under both names, and without the one that says nothing within the context: dynamic scaling
    begins behind `max_position_embeddings`."""
    kind = part.get("rope_type", "default")
    if kind in PLAIN or (kind == "dynamic" and "alpha" not in part):
        kind = "default"
    return {**part, "rope_type": kind, "type": kind}


def exact_tokens(rope: Mapping[str, Any]) -> int | None:
    """How long a sequence may be until its RoPE depends on its length; None for any length. transformers turns all
    positions of a sequence by `short_factor` up to the original length and by `long_factor` beyond."""
    found = [
        int(part["original_max_position_embeddings"])
        for part in parts(rope)
        if part.get("rope_type") in LONG and part.get("short_factor") != part.get("long_factor")
    ]
    return min(found, default=None)


def frequencies(part: Mapping[str, Any], dims: int, longest: int | None) -> tuple[np.ndarray, float] | None:
    """(float64 [dims / 2] radians per position, factor of cosine and sine), as `modeling_rope_utils` of transformers
    has them within the context; `longest` is `max_position_embeddings`. None for a type that is not known."""
    base = float(part["rope_theta"])
    plain = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    match part.get("rope_type", "default"):
        case "dynamic" if part.get("alpha"):
            base *= float(part["alpha"]) ** (dims / (dims - 2))
            return base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims), 1.0
        case "default" | "mrope" | "dynamic":
            return plain, 1.0
        case "linear":
            return plain / float(part["factor"]), 1.0
        case "llama3":
            return _llama3(part, plain), 1.0
        case kind if kind in YARN:
            return _yarn(part, plain, base, longest)
        case kind if kind in LONG:
            return plain / np.asarray(part["short_factor"], np.float64), _longrope_scale(part, longest)
        case "proportional":
            turned = int(float(part.get("partial_rotary_factor") or 1.0) * dims // 2)
            return np.where(np.arange(dims // 2) < turned, plain / float(part.get("factor") or 1.0), 0.0), 1.0
    return None


def _llama3(part: Mapping[str, Any], plain: np.ndarray) -> np.ndarray:
    factor, original = float(part["factor"]), float(part["original_max_position_embeddings"])
    low, high = float(part["low_freq_factor"]), float(part["high_freq_factor"])
    turns = original * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(part: Mapping[str, Any], plain: np.ndarray, base: float, longest: int | None) -> tuple[np.ndarray, float]:
    dims, original = 2 * len(plain), float(part["original_max_position_embeddings"])
    factor = float(part["factor"]) if part.get("factor") is not None else (longest or original) / original

    def corrected(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = corrected(part.get("beta_fast") or 32), corrected(part.get("beta_slow") or 1)
    if part.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high += 0.001 if low == high else 0.0
    interpolated = np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (1 - interpolated) + plain / factor * interpolated, _yarn_scale(part, factor)


def _yarn_scale(part: Mapping[str, Any], factor: float) -> float:
    if part.get("attention_factor") is not None:
        return float(part["attention_factor"])

    def scale(strength: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

    if part.get("mscale") and part.get(WHOLE):
        return scale(float(part["mscale"])) / scale(float(part[WHOLE]))
    return scale(1.0)


def _longrope_scale(part: Mapping[str, Any], longest: int | None) -> float:
    for name in ("short_mscale", "attention_factor"):
        if part.get(name) is not None:
            return float(part[name])
    original = float(part["original_max_position_embeddings"])
    factor = float(part["factor"]) if part.get("factor") is not None else (longest or original) / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
